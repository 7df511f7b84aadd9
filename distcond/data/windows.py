"""How a corpus becomes examples: windows of bytes, each byte's target being the next byte."""

import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from distcond.data.batch import TRAINING, Batch, generator
from distcond.data.corpus import SPLITS, Corpus
from distcond.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class ByteTask:
    """Next-byte prediction; a row is max_length bytes of context.

    Raises DataError if a split is shorter than one window.
    """

    corpus: Corpus
    max_length: int
    "T, bytes of context."
    validation_examples: int
    kind: str = "bytes"
    input_size: int = 256
    output_size: int = 256
    num_classes: int = 256

    def __post_init__(self) -> None:
        for split in SPLITS:
            size, needed = len(getattr(self.corpus, split)), self.max_length + 1
            if size < needed:
                raise DataError(
                    f"data={self.corpus.manifest['source']} has {size} bytes of {split} text, but "
                    f"data.context={self.max_length} needs at least {needed}; "
                    "add text, lower data.context or change data.validation_fraction."
                )

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        """Rows `part` of the global batch `step`: `size` windows at uniformly random places of the training text."""
        starts = generator(seed, step, TRAINING).integers(0, len(self.corpus.train) - self.max_length, size)
        return self._windows(self.corpus.train, starts[part], size)

    def validation_rows(self, start: int, size: int) -> Batch:
        """Rows start..start+size of the validation set: windows evenly spaced over the held-out text."""
        places = len(self.corpus.validation) - self.max_length
        starts = np.arange(start, start + size) * places // self.validation_examples
        return self._windows(self.corpus.validation, starts, size)

    def _windows(self, text: np.ndarray, starts: np.ndarray, global_rows: int) -> Batch:
        windows = sliding_window_view(text, self.max_length + 1)[starts]
        lengths = np.full(len(starts), self.max_length, np.int64)
        inputs, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
        return Batch(inputs, targets, lengths, global_rows * self.max_length)

    def fingerprint(self) -> dict[str, Any]:
        """What the data is: by split, sha256, bytes and number of files; and the Python whose sources `stdlib` are."""
        manifest = self.corpus.manifest
        splits = {split: {**manifest[split], "files": len(manifest[split]["files"])} for split in SPLITS}
        return {"name": manifest["source"], **splits, "python": platform.python_version()}
