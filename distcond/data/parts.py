"""How files are cut into the shards of a corpus."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from distcond.data.shard import Chunk
from distcond.errors import DataError

READ_SIZE = 16 * 2**20
"Bytes read at once."


class Part(NamedTuple):
    """Bytes start..stop of a file."""

    split: str
    name: str
    path: str
    start: int
    stop: int
    documents: int
    "That begin in it."


@dataclass(frozen=True, slots=True)
class FileParts:
    """What a shard is made of, in order. An `Item`."""

    parts: tuple[Part, ...]

    def chunks(self) -> Iterator[Chunk]:
        """The parts' bytes. Raises DataError where a file cannot be read."""
        for part in self.parts:
            documents = part.documents
            for data in read(part.path, part.start, part.stop):
                yield Chunk(part.split, part.name, data, documents)
                documents = 0


def cut(part: Part, most: int, by_lines: bool) -> Iterator[Part]:
    """A part in pieces of equal size, `most` bytes at the most, or that of a line."""
    size = part.stop - part.start
    number = -(-size // most)
    borders = [part.start + size * index // number for index in range(1, number)]
    if by_lines:
        borders = sorted({line_start(part.path, border) for border in borders})
    for start, stop in itertools.pairwise([part.start, *borders, part.stop]):
        if start < stop:
            yield part._replace(start=start, stop=stop, documents=part.documents if start == part.start else 0)


def grouped(parts: Iterable[Part], most: int) -> Iterator[list[Part]]:
    """Consecutive parts that together have `most` bytes at the most."""
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and size + part.stop - part.start > most:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.stop - part.start
    yield group


def line_start(path: str, offset: int) -> int:
    """The first place from `offset` on where a line begins, or the end of the file."""
    with _opened(path) as stream:
        stream.seek(max(0, offset - 1))
        if offset:
            stream.readline()
        return stream.tell()


def read(path: str, start: int, stop: int) -> Iterator[bytes]:
    """Bytes start..stop of a file. Raises DataError where they cannot be read, or are no longer there."""
    with _opened(path) as stream:
        stream.seek(start)
        while start < stop:
            data = stream.read(min(READ_SIZE, stop - start))
            if not data:
                raise DataError(f"{path} has become shorter while it was read; leave files alone while they are prepared.")
            start += len(data)
            yield data


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    try:
        with Path(path).open("rb") as stream:
            yield stream
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); allow it or leave it out of data.files.") from error
