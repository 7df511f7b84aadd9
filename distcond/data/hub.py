"""How a Hugging Face data set, from the hub or from local files, becomes a corpus: `data=hub`.

Only data is read: `datasets` 4 and later runs no code that comes with a data set.
"""

import glob
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distcond.config import DataConfig
from distcond.data.corpus import Corpus, Run, Source, in_turn, open_corpus
from distcond.data.shard import Chunk
from distcond.data.text import BUILDERS, Holdout, TextFile, distinct, is_local_folder, local_files
from distcond.errors import DataError

log = logging.getLogger(__name__)


def open_hub(config: DataConfig, run: Run = in_turn) -> Corpus:
    """The rows of one text column of the split `train`, each ended by a newline; a hash of its number holds a row out.

    Of local files named in `data.files`, a copy of another is left out.
    NOTE: local sources are prepared again when they change; a hub data set is fetched once and kept, so that later runs
    need no network and see the same bytes.
    Raises DataError if the data set cannot be loaded or has no such text.
    """
    files, local = hub_files(config)
    most = config.shard_mib * 2**20
    identity = [config.path, config.subset, files, config.column, config.validation_fraction, most, local]

    def plan() -> list[Rows]:
        # NOTE: `datasets` takes every name for a glob.
        named = [glob.escape(file.path) for file in distinct(local)] if config.path in BUILDERS else []
        return _plan(config, files + named, most)

    source = Source("hub", identity, plan, config.tokenizer)
    return open_corpus(config.cache_dir, source, run)


def hub_files(config: DataConfig) -> tuple[list[str], list[TextFile]]:
    """Names for `datasets`, of files that are elsewhere or in a data set; and the files that are here, or in a folder here.

    Raises DataError for missing ones, and for a folder whose name `datasets` would take for a glob.
    """
    files, local = list(config.files), list[TextFile]()
    if config.path in BUILDERS:
        patterns = [file for file in files if "://" not in file]
        if not files:
            raise DataError(f"data.path={config.path} reads local files; name them, e.g. data.files=['corpus/*.{config.path}'].")
        local = local_files(patterns) if patterns else []
        files = [file for file in files if "://" in file]
    elif is_local_folder(config.path):
        folder = str(Path(config.path).expanduser().resolve())  # NOTE: as `datasets` does
        if glob.escape(folder) != folder:
            raise DataError(f"data.path={folder!r} cannot be read as a data set: its name holds *, ? or [; rename the folder.")
        local = local_files([f"{config.path}/**/*"])
    return files, local


@dataclass(frozen=True, slots=True)
class Rows:
    """What a shard is made of: rows first..stop of a column of Arrow files, put one after the other. An `Item`."""

    files: tuple[str, ...]
    column: str
    first: int
    stop: int
    holdout: Holdout

    def chunks(self) -> Iterator[Chunk]:
        """A chunk for each split and batch of rows. Raises DataError where a file cannot be read."""
        import pyarrow

        number = 0
        try:
            for file in self.files:
                with pyarrow.memory_map(file) as stream:
                    for batch in pyarrow.ipc.open_stream(stream):
                        start, stop = max(0, self.first - number), min(len(batch), self.stop - number)
                        if start < stop:
                            rows = batch.column(self.column)[start:stop].cast(pyarrow.large_binary()).to_pylist()
                            yield from self._split(number + start, rows)
                        number += len(batch)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{file} cannot be read ({' '.join(str(error).split())}); delete it and run again.") from error

    def _split(self, number: int, rows: list[bytes | None]) -> Iterator[Chunk]:
        texts: dict[str, list[bytes]] = {"train": [], "validation": []}
        for index, text in enumerate(rows, start=number):
            texts["validation" if self.holdout.holds(str(index)) else "train"].append(_checked(text or b"", index) + b"\n")
        for split, lines in texts.items():
            yield Chunk(split, "", b"".join(lines), len(lines))


def _checked(text: bytes, row: int) -> bytes:
    """NOTE: pyarrow's reader of JSON takes bytes for text that is none."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        near = text[max(0, error.start - 10) : error.start + 10]
        raise DataError(
            f"Row {row} of the data set is not UTF-8 ({error.reason} near {near!r}); mend it or leave it out."
        ) from error
    return text


def _plan(config: DataConfig, files: list[str], most: int) -> list[Rows]:
    from pyarrow import compute

    rows = _load(config.path, config.subset, files)
    if config.column not in rows.column_names:
        raise DataError(f"data.column={config.column!r} is not in {config.path}; it has {', '.join(rows.column_names)}.")
    kind = getattr(rows.features[config.column], "dtype", "no text")
    if kind not in {"string", "large_string"}:
        raise DataError(f"data.column={config.column!r} of {config.path} holds {kind}; name a column of strings.")
    number = len(rows)
    if not number:
        raise DataError(f"data.path={config.path!r} has no rows; name a data set with text in it.")

    size = number + (compute.sum(compute.binary_length(rows.data.column(config.column))).as_py() or 0)
    count = min(number, -(-size // most))
    borders = [number * index // count for index in range(count + 1)]
    holdout = Holdout.of(map(str, range(number)), config.validation_fraction)
    arrow = tuple(entry["filename"] for entry in rows.cache_files)
    return [Rows(arrow, config.column, borders[index], borders[index + 1], holdout) for index in range(count)]


def _load(path: str, subset: str, files: list[str]) -> Any:
    """The split `train` as a `datasets.Dataset` in files."""
    import datasets  # here, because it takes seconds that other tasks need not wait

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are raised as well
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    log.info("Loading data set %s.", path)
    try:
        return datasets.load_dataset(path, subset or None, data_files=files or None, split="train", keep_in_memory=False)
    except Exception as error:  # whatever goes wrong in there, the user's way out is the same
        is_parsing = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
        cause = error.__cause__ if is_parsing else error
        line = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise DataError(
            f"Data set {path!r} cannot be loaded: {line}; check data.path, data.subset, data.files and the network."
        ) from error
