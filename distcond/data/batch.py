"""What one rank sees in one micro-batch, and the random numbers that belong to a step."""

from dataclasses import dataclass

import numpy as np

TRAINING, VALIDATION = 0, 1
"Streams of random numbers: what is validated is never drawn from the stream that trains."

NO_TARGET = -1
"Class number where nothing is asked."


@dataclass(slots=True)
class Batch:
    """Examples with their targets; a row of length 0 is padding and counts for nothing."""

    inputs: np.ndarray
    "bytes: uint8 [B, T]; vectors: float32 [B, T, I]."
    targets: np.ndarray
    "bytes: uint8 [B, T]; vectors: 0 or 1, float32 [B, T, O], or class numbers (NO_TARGET: none), int64 [B, T, groups]."
    lengths: np.ndarray
    "int64 [B], time steps that count."
    global_count: int
    "What the loss sum is divided by: tokens (bytes) or sequences (vectors) of all ranks and micro-batches together."


def select(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch; `global_count` stays that of the whole."""
    return Batch(batch.inputs[rows], batch.targets[rows], batch.lengths[rows], batch.global_count)


def pad(batch: Batch, size: int) -> Batch:
    """The batch with rows of zeros and length 0 appended, up to `size` rows."""

    def extend(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])

    return Batch(extend(batch.inputs), extend(batch.targets), extend(batch.lengths), batch.global_count)


def generator(seed: int, step: int, stream: int) -> np.random.Generator:
    """Random numbers that depend on (seed, step, stream) alone, so that any process can draw any step.

    Counter-based: the step is the counter's highest word, so steps never overlap (Salmon et al. 2011, Philox).
    """
    key, counter = np.array([seed, stream], np.uint64), np.array([0, 0, 0, step], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
