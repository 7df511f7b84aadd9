"""Sorting of Graves 2016 (arXiv 1603.08983, section 3.4): numbers are read one a step, then their ranks are asked for.

Shapes: B examples, T time steps, M most numbers.
"""

import numpy as np

from distcond.data.batch import NO_TARGET, Batch
from distcond.data.generated import GeneratedTask


def sort(max_length: int) -> GeneratedTask:
    """Which of the numbers is the smallest, which comes next, and so on?

    inputs [B, T, 2], T = 2 max_length: n = 2 to max_length numbers from a standard normal distribution, one a step, beside a
    flag that is 1 at the last of them; then n steps of zeros.
    targets [B, T, 1]: at these, the places (0 to n - 1) of the numbers in ascending order; before, none.
    """

    def draw(rng: np.random.Generator, size: int) -> Batch:
        counts = rng.integers(2, max_length + 1, (size, 1))
        place = np.arange(max_length)
        is_number_BM = place < counts
        numbers_BM = rng.standard_normal((size, max_length))
        order_BM = np.where(is_number_BM, numbers_BM, np.inf).argsort(axis=1, kind="stable")

        inputs = np.zeros((size, 2 * max_length, 2), np.float32)
        inputs[:, :max_length, 0] = numbers_BM * is_number_BM
        inputs[:, :max_length, 1] = place == counts - 1
        targets = np.full((size, 2 * max_length, 1), NO_TARGET, np.int64)
        row, step = is_number_BM.nonzero()
        targets[row, counts[row, 0] + step, 0] = order_BM[row, step]
        return Batch(inputs, targets, 2 * counts[:, 0], size)

    return GeneratedTask("sort", 2, max_length, 2 * max_length, draw, {"max_length": max_length}, num_classes=max_length)
