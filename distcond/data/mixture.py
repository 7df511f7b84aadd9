"""Several texts in one batch: which of them a row is from, and where in it, are pure functions of (seed, step, row)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distcond.data.batch import TRAINING, Batch, generator
from distcond.data.windows import ByteTask

CHOOSING = 2
"The stream of random numbers that choose sources, beside TRAINING and VALIDATION."


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Rows of several texts, which share context and tokenizer; of training, each row's source is drawn by weight."""

    names: Sequence[str]
    shares: np.ndarray
    "float64, sum 1."
    tasks: Sequence[ByteTask]
    "Their `validation_examples` are those of `allotted`."
    kind: str = "bytes"

    @property
    def input_size(self) -> int:
        """The vocabulary, as of `ByteTask`."""
        return self.tasks[0].input_size

    output_size = num_classes = input_size

    @property
    def max_length(self) -> int:
        """T, bytes or tokens of context."""
        return self.tasks[0].max_length

    @property
    def unit(self) -> str:
        """What is predicted, for people: bytes or tokens."""
        return self.tasks[0].unit

    def bytes_per_token(self, split: str) -> float:
        """Mean over the tokens of a batch or of the validation set, in which every row has as many."""
        shares = self.shares
        if split == "validation":
            shares = np.array([task.validation_examples for task in self.tasks])
        return float(np.average([task.bytes_per_token(split) for task in self.tasks], weights=shares))

    def source_of(self, seed: int, step: int, size: int) -> np.ndarray:
        """Index of each row's source, int64 [size]: row i depends on (seed, step, i) alone."""
        places = generator(seed, step, CHOOSING).random(size)
        return np.minimum(np.searchsorted(np.cumsum(self.shares), places, side="right"), len(self.shares) - 1)

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        """Rows `part` of the global batch `step`: windows at uniformly random places of their sources."""
        sources, places = self.source_of(seed, step, size)[part], generator(seed, step, TRAINING).random(size)[part]
        batches = [task.windows_at("train", places[sources == index]) for index, task in enumerate(self.tasks)]
        batch = _joined(batches)
        order = np.argsort(np.argsort(sources, kind="stable"))  # place of each row among those sorted by source
        return Batch(batch.inputs[order], batch.targets[order], batch.lengths[order], size * self.max_length)

    def validation_rows(self, start: int, size: int) -> Batch:
        """Rows start..start+size of the validation set: each source's own, in the order of the sources."""
        batches, first = [], 0
        for task in self.tasks:
            begin = min(max(start - first, 0), task.validation_examples)
            end = min(max(start + size - first, 0), task.validation_examples)
            batches.append(task.validation_rows(begin, end - begin))
            first += task.validation_examples
        return _joined(batches)

    def fingerprint(self) -> dict[str, Any]:
        """What the data is: share and fingerprint of each source."""
        parts = zip(self.names, self.shares, self.tasks, strict=True)
        return {
            "name": "mixture",
            "sources": {name: {"share": float(share), **task.fingerprint()} for name, share, task in parts},
        }


def allotted(shares: np.ndarray, number: int) -> list[int]:
    """`number` cut by shares into whole numbers, each at most 1 off; what is left goes to the largest remainders."""
    exact = shares * number
    counts = np.floor(exact).astype(int)
    most = np.argsort(counts - exact, kind="stable")[: number - counts.sum()]
    counts[most] += 1
    return [int(count) for count in counts]


def _joined(batches: Sequence[Batch]) -> Batch:
    return Batch(
        np.concatenate([batch.inputs for batch in batches]),
        np.concatenate([batch.targets for batch in batches]),
        np.concatenate([batch.lengths for batch in batches]),
        sum(batch.global_count for batch in batches),
    )
