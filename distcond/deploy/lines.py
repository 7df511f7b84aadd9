"""Lines of a stream, in groups, as soon as they are there: whoever types one is answered before the input ends."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from distcond.errors import DataError

MAX_LINE = 2**20
"Bytes of a line; a model sees the last few hundred."
CHUNK = 2**16
"Bytes that are read at once, or as many as are there."


class Source(Protocol):
    """What is read: a binary stream."""

    def read1(self, size: int, /) -> bytes:
        """At most so many bytes, as soon as there are any; none at the end."""


class Line(NamedTuple):
    """A line that is not blank."""

    number: int
    "From 1."
    text: str


def groups_of_lines(source: Source, name: str, size: int) -> Iterator[list[Line]]:
    """Up to `size` lines at a time, blank ones left out.

    Raises DataError where the source has none, and, once the lines before it have been given, where one is too long or no text.
    """
    number, is_empty = 0, True
    for chunk in _chunks(source):
        group: list[Line] = []
        for data in chunk:
            number += 1
            if data.strip():
                is_empty = False
                try:
                    group.append(Line(number, _text(data, f"{name}, line {number}")))
                except DataError:
                    if group:
                        yield group
                    raise
            if len(group) == size:
                yield group
                group = []
        if group:
            yield group
    if is_empty:
        raise DataError(f"{name} is empty; give a line for each answer that is wanted.")


def _chunks(source: Source) -> Iterator[list[bytes]]:
    """The lines that end in what is read at once; of one that goes on beyond MAX_LINE, what has been read."""
    rest = b""
    while chunk := source.read1(CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE:
            lines.append(rest)
        yield lines
    if rest:
        yield [rest]


def _text(data: bytes, where: str) -> str:
    if len(data) > MAX_LINE:
        raise DataError(
            f"{where} has more than {MAX_LINE:,} bytes; a model sees the end of it alone: cut it, or break it into lines."
        )
    try:
        text = data.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error.reason}, byte {error.start}); give text in UTF-8.") from error
    if "\0" in text:
        raise DataError(f"{where} is binary (byte {text.index(chr(0))} is 0); give text.")
    return text
