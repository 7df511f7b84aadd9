"""How a corpus is kept: shards of bytes or tokens, train and validation, sealed by a manifest, prepared once.

CACHE/corpora/KEY/  00000/ 00001/ ...  manifest.json          (the last one written)
"""

import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distcond.data.shard import SPLITS, Item, Shard, cannot_write
from distcond.data.stream import Stream
from distcond.data.tokens import NUM_BYTES, dtype_of, sha256_of, vocabulary_of
from distcond.errors import DataError

log = logging.getLogger(__name__)

FORMAT = 2
"Raised when the same sources would be written differently."
MANIFEST = "manifest.json"

Run = Callable[[Sequence[Shard]], Iterable[int]]
"Writes shards, in any order; of each, when it is written, yields the bytes of text."


@dataclass(frozen=True, slots=True)
class Source:
    """Where a corpus comes from."""

    name: str
    "Of the source, as in `data.name`."
    identity: Any
    "JSON of whatever, when it changes, calls for a new preparation."
    plan: Callable[[], Sequence[Item]]
    "Cuts the source into shards: the same ones for the same identity."
    tokenizer: str = ""
    "Path of a `tokenizers` file; empty: bytes."
    errors: str = "strict"
    "As of `encoder`."


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """A prepared corpus, open for reading."""

    train: Stream
    validation: Stream
    "None of it is in `train`."
    manifest: dict[str, Any]
    "`source`, `tokenizer`, `shards` and, by split, `sha256`, `bytes`, `tokens`, `documents`, `files`."
    vocabulary: int = NUM_BYTES
    folder: Path = Path()


def in_turn(shards: Sequence[Shard]) -> Iterator[int]:
    """Write shards one after the other in this process."""
    for shard in shards:
        record = shard.write()
        yield sum(record[split]["bytes"] for split in SPLITS)


def open_corpus(cache_dir: str, source: Source, run: Run = in_turn) -> Corpus:
    """The corpus of a source, prepared by `run` if the cache does not hold it; shards that are whole are not written again.

    Any number of processes may do this at once: each writes what is missing, and of equal shards the first one stays.
    Raises DataError if the source cannot be read, the cache not be written, or a prepared corpus is damaged.
    """
    identity = [FORMAT, source.name, source.identity, sha256_of(source.tokenizer)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    folder = Path(cache_dir).expanduser().absolute() / "corpora" / key
    if not (folder / MANIFEST).exists():
        _prepare(folder, source, run)
    vocabulary = vocabulary_of(source.tokenizer)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        train, validation = (Stream(_open_split(folder, manifest, split, dtype_of(vocabulary))) for split in SPLITS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    return Corpus(train, validation, manifest, vocabulary, folder)


def verify(corpus: Corpus) -> None:
    """Read every shard. Raises DataError, naming the first that is not as the manifest says."""
    for number, shard in enumerate(corpus.manifest["shards"]):
        for split in SPLITS:
            name = f"{number:05d}/{split}.bin"
            with (corpus.folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard[split]["sha256"]:
                    raise _damaged(corpus.folder, ValueError(f"the sha256 of {name} is not the manifest's"))


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"The prepared corpus {folder} is damaged ({error}); delete that folder and run again.")


def _open_split(folder: Path, manifest: dict[str, Any], split: str, dtype: np.dtype[Any]) -> list[np.ndarray]:
    shards = []
    for number, shard in enumerate(manifest["shards"]):
        path, needed = folder / f"{number:05d}" / f"{split}.bin", shard[split]["tokens"] * dtype.itemsize
        size = path.stat().st_size
        if size != needed:
            raise ValueError(f"{number:05d}/{path.name} has {size} bytes, not {needed}")
        shards.append(np.memmap(path, dtype, "r") if size else np.empty(0, dtype))
    for count in ("bytes", "tokens", "documents"):
        total, given = sum(shard[split][count] for shard in manifest["shards"]), manifest[split][count]
        if total != given:
            raise ValueError(f"its {len(shards)} shards have {total} {split} {count}, its manifest says {given}")
    return shards


def _prepare(folder: Path, source: Source, run: Run) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shards = [Shard(str(folder), number, item, source.tokenizer, source.errors) for number, item in enumerate(source.plan())]
        for _ in run([shard for shard in shards if shard.written() is None]):
            pass
        manifest = _seal(folder, source, shards)
    except (DataError, OSError) as error:
        if (folder / MANIFEST).exists():
            return  # another process was faster
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(folder.parent, error) from error
        raise
    sizes = ", ".join(f"{manifest[split]['bytes'] / 1e6:.2f} MB {split}" for split in SPLITS)
    log.info("Prepared data=%s: %s in %s.", source.name, sizes, folder)


def _seal(folder: Path, source: Source, shards: Sequence[Shard]) -> dict[str, Any]:
    """Write the manifest, once every shard is whole, and remove what killed processes have left behind."""
    records = [shard.written() for shard in shards]
    if None in records:
        raise _damaged(
            folder,
            ValueError(f"{shards[records.index(None)].path.name} is not there; is data.cache_dir storage that all nodes share?"),
        )
    manifest: dict[str, Any] = {"format": FORMAT, "source": source.name, "tokenizer": sha256_of(source.tokenizer)}
    for split in SPLITS:
        parts = [record[split] for record in records if record is not None]
        counts = {count: sum(part[count] for part in parts) for count in ("bytes", "tokens", "documents")}
        files = list(dict.fromkeys(name for part in parts for name in part["files"]))
        manifest[split] = {"sha256": _digest([part["sha256"] for part in parts]), **counts, "files": files}
    kept = ("sha256", "bytes", "tokens", "documents")
    manifest["shards"] = [
        {split: {key: record[split][key] for key in kept} for split in SPLITS} for record in records if record is not None
    ]
    unfinished = folder / f".{MANIFEST}.{secrets.token_hex(8)}"
    unfinished.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    unfinished.replace(folder / MANIFEST)
    for left in folder.glob(".?*"):
        shutil.rmtree(left, ignore_errors=True)
        if left.is_file():
            left.unlink(missing_ok=True)
    return manifest


def _digest(sha256: Sequence[str]) -> str:
    """Of one shard its sha256; of more, the sha256 of theirs, one a line."""
    return sha256[0] if len(sha256) == 1 else hashlib.sha256("\n".join(sha256).encode()).hexdigest()
