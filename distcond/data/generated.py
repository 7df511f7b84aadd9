"""A task whose examples are drawn, not read: the same for the same (seed, step), whoever asks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distcond.data.batch import TRAINING, VALIDATION, Batch, generator, select

Options = dict[str, int | bool | list[int]]

VALIDATION_BLOCK = 256
"Validation rows are drawn in blocks of this many, so that row i is the same however many are asked for."


def _nonzero(inputs: np.ndarray) -> np.ndarray:
    return np.asarray(np.count_nonzero(inputs, axis=2))


@dataclass(frozen=True, slots=True)
class GeneratedTask:
    """A task whose examples are drawn, not read."""

    name: str
    input_size: int
    output_size: int
    max_length: int
    "T, time steps that every batch is padded to."
    draw: Callable[[np.random.Generator, int], Batch]
    "So many fresh examples."
    options: Options
    "What else decides the examples, for the fingerprint."
    num_classes: int = 1
    "C: the outputs are groups of C, one class each; 1: every output is a binary target of its own."
    kind: str = "vectors"
    draw_validation: Callable[[np.random.Generator, int], Batch] | None = None
    "The same for the validation set, where it asks for other examples; None: it does not."

    measure: str = ""
    "What an element has more or less of, e.g. digits; empty: nothing that counts."
    measured: Callable[[np.ndarray], np.ndarray] = _nonzero
    "How much of it each element of inputs [B, T, I] has: int64 [B, T]."

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        """Rows `part` of the global batch `step`, which has `size` rows."""
        return select(self.draw(generator(seed, step, TRAINING), size), part)

    def validation_rows(self, start: int, size: int) -> Batch:
        """Rows start..start+size of the fixed validation set, which depends on no seed; `global_count` is `size`."""
        first = start // VALIDATION_BLOCK
        last = max(first, (start + size - 1) // VALIDATION_BLOCK)
        draw = self.draw_validation or self.draw
        blocks = [draw(generator(0, step, VALIDATION), VALIDATION_BLOCK) for step in range(first, last + 1)]
        rows = slice(start - first * VALIDATION_BLOCK, start + size - first * VALIDATION_BLOCK)
        return Batch(
            np.concatenate([block.inputs for block in blocks])[rows],
            np.concatenate([block.targets for block in blocks])[rows],
            np.concatenate([block.lengths for block in blocks])[rows],
            size,
        )

    def fingerprint(self) -> dict[str, Any]:
        """What the data is; numpy's version counts because its streams may change between versions (NEP 19)."""
        return {"name": self.name, **self.options, "numpy": np.__version__}
