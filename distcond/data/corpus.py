"""How a corpus is kept: two memory-mapped files of bytes, train and validation, with a manifest, prepared once.

CACHE/corpora/KEY/  train.bin  validation.bin  manifest.json
"""

import errno
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distcond.errors import DataError

log = logging.getLogger(__name__)

FORMAT = 1
"Raised when the same sources would be written differently."
SPLITS = ("train", "validation")

Chunk = tuple[str, str, bytes]
"Split, name of the file it comes from (empty: none), bytes."


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """A prepared corpus, open for reading."""

    train: np.ndarray
    "uint8 [bytes], memory-mapped."
    validation: np.ndarray
    "uint8 [bytes], memory-mapped; none of it is in `train`."
    manifest: dict[str, Any]
    "`source` and, by split, `sha256`, `bytes`, `files`."


def open_corpus(cache_dir: str, source: str, identity: Any, chunks: Callable[[], Iterable[Chunk]]) -> Corpus:
    """The corpus of `source`, written from `chunks()` if the cache has none of this `identity`.

    identity: JSON of whatever, when it changes, calls for a new preparation.
    Any number of processes may do this at once: each writes its own copy, the first to finish gives it the name.
    Raises DataError if the cache cannot be written or a prepared corpus is damaged.
    """
    key = hashlib.sha256(json.dumps([FORMAT, source, identity], sort_keys=True).encode()).hexdigest()[:24]
    folder = Path(cache_dir).expanduser().absolute() / "corpora" / key
    if not folder.is_dir():
        _prepare(folder, source, chunks)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return Corpus(_open_split(folder, manifest, "train"), _open_split(folder, manifest, "validation"), manifest)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"The prepared corpus {folder} is damaged ({error}); delete that folder and run again.") from error


def _open_split(folder: Path, manifest: dict[str, Any], split: str) -> np.ndarray:
    path, size = folder / f"{split}.bin", manifest[split]["bytes"]
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")
    return np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)


def _prepare(folder: Path, source: str, chunks: Callable[[], Iterable[Chunk]]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            written = Path(temporary) / "corpus"
            written.mkdir()
            manifest = _write(written, source, chunks())
            _publish(written, folder)
    except OSError as error:
        raise DataError(
            f"The corpus cannot be written below {folder.parent} ({error.strerror}); "
            "set data.cache_dir to a folder with room that you may write."
        ) from error
    sizes = ", ".join(f"{manifest[split]['bytes'] / 1e6:.2f} MB {split}" for split in SPLITS)
    log.info("Prepared data=%s: %s in %s.", source, sizes, folder)


def _write(folder: Path, source: str, chunks: Iterable[Chunk]) -> dict[str, Any]:
    digests = {split: hashlib.sha256() for split in SPLITS}
    files: dict[str, dict[str, None]] = {split: {} for split in SPLITS}  # a dict keeps the order of first appearance
    with ExitStack() as stack:
        outputs = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        for split, name, data in chunks:
            outputs[split].write(data)
            digests[split].update(data)
            files[split].update({name: None} if name else {})
        manifest: dict[str, Any] = {"format": FORMAT, "source": source}
        for split in SPLITS:
            manifest[split] = {
                "sha256": digests[split].hexdigest(),
                "bytes": outputs[split].tell(),
                "files": list(files[split]),
            }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def _publish(written: Path, folder: Path) -> None:
    """Give the finished folder its name, unless another process has just done so with the same bytes."""
    try:
        written.rename(folder)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
