"""How one shard of a corpus is written: the unit of work of a preparation, the same bytes on disk whoever writes it.

CORPUS/00000/  train.bin  validation.bin  shard.json
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from distcond.data.tokens import encoder
from distcond.errors import DataError

SPLITS = ("train", "validation")
RECORD = "shard.json"


class Chunk(NamedTuple):
    """Consecutive bytes of one split; those of one file stand one after the other."""

    split: str
    name: str
    "Of the file they come from; empty: none."
    data: bytes
    documents: int = 0
    "Documents that begin in it."


class Item(Protocol):
    """What one shard is made of; small enough to be sent to another process, and a pure function of what it reads."""

    def chunks(self) -> Iterator[Chunk]:
        """The text, in order. Raises DataError where it cannot be read."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard that is to be written into the folder of a corpus."""

    folder: str
    number: int
    item: Item
    tokenizer: str
    "Path of a `tokenizers` file; empty: bytes."
    errors: str = "strict"
    "As of `encoder`."

    @property
    def path(self) -> Path:
        """Its own folder, which is there once the shard is whole."""
        return Path(self.folder) / f"{self.number:05d}"

    def written(self) -> dict[str, Any] | None:
        """The record of the shard if it is whole: by split `sha256`, `size` of the file, `bytes` of text, `tokens`,
        `documents`, `files`. One that is damaged is removed.
        """
        if not self.path.is_dir():
            return None
        try:
            record: dict[str, Any] = json.loads((self.path / RECORD).read_bytes())
            if all((self.path / f"{split}.bin").stat().st_size == record[split]["size"] for split in SPLITS):
                return record
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(self.path, ignore_errors=True)
        return None

    def write(self) -> dict[str, Any]:
        """Write it, whole or not at all; returns its record. Any number of processes may do so at once.

        Raises DataError if the text cannot be read or the folder not be written.
        """
        try:
            with tempfile.TemporaryDirectory(prefix=f".{self.path.name}.", dir=self.folder, ignore_cleanup_errors=True) as parent:
                unfinished = Path(parent) / "shard"
                unfinished.mkdir()
                record = self._fill(unfinished)
                (unfinished / RECORD).write_text(json.dumps(record), encoding="utf-8")
                unfinished.rename(self.path)
                return record
        except OSError as error:
            record_of_another = self.written()  # who was faster, with the same bytes
            if record_of_another is None:
                raise cannot_write(Path(self.folder), error) from error
            return record_of_another

    def _fill(self, folder: Path) -> dict[str, Any]:
        chunks, encode = self.item.chunks(), None
        if self.tokenizer:
            chunks, encode = _by_lines(chunks), encoder(self.tokenizer, self.errors)
        with ExitStack() as stack:
            files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
            outputs = {split: _Output(file) for split, file in files.items()}
            for chunk in chunks:
                ids = encode(chunk.data, chunk.name) if encode else np.frombuffer(chunk.data, np.uint8)
                outputs[chunk.split].add(chunk, ids)
            return {split: output.record() for split, output in outputs.items()}


@dataclass(slots=True)
class _Output:
    """One file of a shard, and what it comes to."""

    file: IO[bytes]
    digest: Any = field(default_factory=hashlib.sha256)
    num_bytes: int = 0
    tokens: int = 0
    documents: int = 0
    names: dict[str, None] = field(default_factory=dict)
    "In the order of first appearance."

    def add(self, chunk: Chunk, ids: np.ndarray) -> None:
        self.file.write(ids.data)
        self.digest.update(ids.data)
        self.num_bytes += len(chunk.data)
        self.tokens += len(ids)
        self.documents += chunk.documents
        self.names.update({chunk.name: None} if chunk.name else {})

    def record(self) -> dict[str, Any]:
        return {
            "sha256": self.digest.hexdigest(),
            "size": self.file.tell(),
            "bytes": self.num_bytes,
            "tokens": self.tokens,
            "documents": self.documents,
            "files": list(self.names),
        }


def _by_lines(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks cut anew, so that of a file each but the last ends with a line, and none inside a character."""
    for (split, name), group in itertools.groupby(chunks, key=lambda chunk: (chunk.split, chunk.name)):
        rest = b""
        for chunk in group:
            data = rest + chunk.data
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            yield chunk._replace(data=data[:end])
        if rest:
            yield Chunk(split, name, rest)


def cannot_write(folder: Path, error: OSError) -> DataError:
    """What the user is told where a corpus cannot be written."""
    return DataError(
        f"The corpus cannot be written below {folder} ({error.strerror}); "
        "set data.cache_dir to a folder with room that you may write."
    )
