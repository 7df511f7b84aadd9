"""How a Hugging Face data set, from the hub or from local files, becomes a byte corpus: `data=hf`.

Only data is read: `datasets` 4 and later runs no code that comes with a data set.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from distcond.config import DataConfig
from distcond.data.corpus import Chunk, Corpus, open_corpus
from distcond.data.text import BUILDERS, held_out, is_local_folder, local_files
from distcond.errors import DataError

log = logging.getLogger(__name__)

READ_ROWS = 1000
"Rows read at once."


def open_hub(config: DataConfig) -> Corpus:
    """The rows of one text column of the split `train`, each ended by a newline; a hash of its number holds a row out.

    NOTE: local sources are prepared again when they change; a hub data set is fetched once and kept, so that later runs
    need no network and see the same bytes.
    Raises DataError if the data set cannot be loaded or has no such text.
    """
    files = list(config.files)
    local = []
    if config.path in BUILDERS:
        urls = [file for file in files if "://" in file]
        patterns = [file for file in files if "://" not in file]
        if not files:
            raise DataError(f"data.path={config.path} reads local files; name them, e.g. data.files=['corpus/*.{config.path}'].")
        local = local_files(patterns) if patterns else []
        files = urls + [file.path for file in local]
    elif is_local_folder(config.path):
        local = local_files([f"{config.path}/**/*"])
    identity = [config.path, files, config.column, config.validation_fraction, local]
    return open_corpus(config.cache_dir, "hf", identity, lambda: _chunks(config, files))


def _chunks(config: DataConfig, files: list[str]) -> Iterator[Chunk]:
    rows = _load(config.path, files)
    if config.column not in rows.column_names:
        raise DataError(f"data.column={config.column!r} is not in {config.path}; it has {', '.join(rows.column_names)}.")
    kind = getattr(rows.features[config.column], "dtype", "no text")
    if kind not in {"string", "large_string"}:
        raise DataError(f"data.column={config.column!r} of {config.path} holds {kind}; name a column of strings.")
    if not len(rows):
        raise DataError(f"data.path={config.path!r} has no rows; name a data set with text in it.")

    is_held_out = iter(held_out([str(number) for number in range(len(rows))], config.validation_fraction))
    for batch in rows.select_columns(config.column).iter(READ_ROWS):
        texts = [(text or "").encode() + b"\n" for text in batch[config.column]]
        flags = list(itertools.islice(is_held_out, len(texts)))
        yield "train", "", b"".join(itertools.compress(texts, (not flag for flag in flags)))
        yield "validation", "", b"".join(itertools.compress(texts, flags))


def _load(path: str, files: list[str]) -> Any:
    """The split `train` as a `datasets.Dataset`."""
    import datasets  # here, because it takes seconds that other tasks need not wait

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    log.info("Loading data set %s.", path)
    try:
        return datasets.load_dataset(path, data_files=files or None, split="train")
    except Exception as error:  # whatever goes wrong in there, the user's way out is the same
        is_parsing = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
        line = " ".join(str(error.__cause__ if is_parsing else error).split())[:300]
        raise DataError(f"Data set {path!r} cannot be loaded: {line}; check data.path, data.files and the network.") from error
