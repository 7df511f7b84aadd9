"""Addition, against sums of Python's own integers."""

import numpy as np
import pytest

from distcond.data.addition import addition


def read_number(vector: list[float], max_digits: int) -> str:
    """The digits of an input vector; they come first and are one-hot."""
    chunks = [vector[10 * place : 10 * place + 10] for place in range(max_digits)]
    used = [sum(chunk) for chunk in chunks]
    assert used == sorted(used, reverse=True) and set(used) <= {0.0, 1.0}
    return "".join(str(chunk.index(1.0)) for chunk in chunks if sum(chunk))


@pytest.mark.parametrize(("max_length", "max_digits"), [(1, 1), (2, 3), (5, 5), (10, 17)])
def test_targets_are_the_digits_of_the_sum_so_far(max_length: int, max_digits: int) -> None:
    batch = addition(max_length, max_digits).rows(0, 0, 300)
    assert batch.inputs.shape == (300, max_length, 10 * max_digits) and batch.inputs.dtype == np.float32
    assert batch.targets.shape == (300, max_length, max_digits + 1) and batch.targets.dtype == np.int64
    for vectors, targets, length in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.lengths.tolist(), strict=True):
        total = int(read_number(vectors[0], max_digits))
        assert targets[0] == [-1] * (max_digits + 1)  # nothing to add up yet
        for vector, target in zip(vectors[1:length], targets[1:length], strict=True):
            total += int(read_number(vector, max_digits))
            digits = [int(digit) for digit in str(total)]
            assert target == digits + [10] * (max_digits + 1 - len(digits))
        assert not np.any(vectors[length:]) and np.all(np.array(targets[length:]) == -1)


def test_lengths_and_digits_are_drawn_evenly() -> None:
    """10,000 rows: a share of 1/5 has a standard error of 0.004, one of 1/10 of less; the bounds are four or more of them."""
    batch = addition(5, 5).rows(0, 0, 10_000)
    assert np.abs(np.bincount(batch.lengths, minlength=6)[1:] / 10_000 - 1 / 5).max() < 0.016
    chunks = batch.inputs[:, 0].reshape(10_000, 5, 10)
    assert np.abs(np.bincount(chunks.sum((1, 2)).astype(int), minlength=6)[1:] / 10_000 - 1 / 5).max() < 0.016
    assert np.abs(chunks.sum((0, 1)) / chunks.sum() - 1 / 10).max() < 0.012
