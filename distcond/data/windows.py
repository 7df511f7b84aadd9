"""How a corpus becomes examples: windows of bytes or tokens, the target of each being the next one."""

import platform
from dataclasses import dataclass
from typing import Any

import numpy as np

from distcond.data.batch import TRAINING, Batch, generator
from distcond.data.corpus import Corpus
from distcond.data.shard import SPLITS
from distcond.data.stream import Stream
from distcond.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class ByteTask:
    """Prediction of the next byte, or token where the corpus has a tokenizer; a row is max_length of them.

    Raises DataError if a split is shorter than one window.
    """

    corpus: Corpus
    max_length: int
    "T, bytes or tokens of context."
    validation_examples: int
    kind: str = "bytes"

    def __post_init__(self) -> None:
        for split in SPLITS:
            size, needed = len(getattr(self.corpus, split)), self.max_length + 1
            if size < needed:
                advice = "add text, lower data.context or change data.validation_fraction"
                if split == "validation" and not size and self._is_lone_file():
                    advice = (
                        r'with data.tokenizer a lone file is split at the end of a line ("\n"), and its last '
                        "data.validation_fraction has none; break it into lines or add another file"
                    )
                raise DataError(
                    f"data={self.corpus.manifest['source']} has {size} {self.unit} of {split} text, but "
                    f"data.context={self.max_length} needs at least {needed}; {advice}."
                )

    def _is_lone_file(self) -> bool:
        """Whether the text is one local file, which with a tokenizer is cut at the end of a line."""
        manifest = self.corpus.manifest
        return manifest["source"] == "text" and self.unit == "tokens" and len(manifest["train"]["files"]) == 1

    @property
    def input_size(self) -> int:
        """The vocabulary: 256 bytes, or as many tokens as the tokenizer has."""
        return self.corpus.vocabulary

    output_size = num_classes = input_size

    @property
    def unit(self) -> str:
        """What is predicted, for people: bytes or tokens."""
        return "tokens" if self.corpus.manifest.get("tokenizer") else "bytes"

    def bytes_per_token(self, split: str) -> float:
        """Bytes of text over tokens, of a whole split; 1 without a tokenizer."""
        counts = self.corpus.manifest[split]
        return counts["bytes"] / counts["tokens"] if self.unit == "tokens" else 1.0

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        """Rows `part` of the global batch `step`: `size` windows at uniformly random places of the training text."""
        starts = generator(seed, step, TRAINING).integers(0, len(self.corpus.train) - self.max_length, size)
        return self._windows(self.corpus.train, starts[part], size)

    def validation_rows(self, start: int, size: int) -> Batch:
        """Rows start..start+size of the validation set: windows evenly spaced over the held-out text."""
        places = len(self.corpus.validation) - self.max_length
        starts = np.arange(start, start + size) * places // self.validation_examples
        return self._windows(self.corpus.validation, starts, size)

    def windows_at(self, split: str, places: np.ndarray) -> Batch:
        """Windows that begin at these places of a split, float64 in [0, 1)."""
        text: Stream = getattr(self.corpus, split)
        starts = (places * (len(text) - self.max_length)).astype(np.int64)
        return self._windows(text, starts, len(starts))

    def _windows(self, text: Stream, starts: np.ndarray, global_rows: int) -> Batch:
        windows = text.windows(starts, self.max_length + 1)
        if windows.dtype != np.uint8:
            windows = windows.astype(np.int32)
        lengths = np.full(len(starts), self.max_length, np.int64)
        inputs, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
        return Batch(inputs, targets, lengths, global_rows * self.max_length)

    def fingerprint(self) -> dict[str, Any]:
        """What the data is: by split, sha256, counts, number of files; tokenizer; the Python whose sources `stdlib` are."""
        manifest = self.corpus.manifest
        splits = {split: {**manifest[split], "files": len(manifest[split]["files"])} for split in SPLITS}
        named = {"name": manifest["source"], "tokenizer": manifest["tokenizer"]}
        return {**named, **splits, "python": platform.python_version()}
