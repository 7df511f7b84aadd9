"""Sorting, against Python's own."""

import numpy as np
import pytest

from distcond.data.sort import sort


@pytest.mark.parametrize("max_length", [2, 5, 15])
def test_after_the_numbers_their_places_in_ascending_order_are_asked_for(max_length: int) -> None:
    batch = sort(max_length).rows(0, 0, 300)
    assert batch.inputs.shape == (300, 2 * max_length, 2) and batch.inputs.dtype == np.float32
    assert batch.targets.shape == (300, 2 * max_length, 1) and batch.targets.dtype == np.int64
    counts = batch.lengths // 2
    assert set(counts.tolist()) == set(range(2, max_length + 1)) and not (batch.lengths % 2).any()
    for inputs, targets, count in zip(batch.inputs, batch.targets[:, :, 0], counts, strict=True):
        numbers = inputs[:count, 0].tolist()
        assert len(set(numbers)) == count
        assert inputs[:count, 1].tolist() == [0.0] * (count - 1) + [1.0] and not inputs[count:].any()
        expected = sorted(range(count), key=numbers.__getitem__)
        assert targets.tolist() == [-1] * count + expected + [-1] * (2 * max_length - 2 * count)


def test_numbers_are_standard_normal() -> None:
    """Some 51,000 numbers: the mean has a standard error of 0.0045, the variance one of 0.0063; bounds are four of them."""
    batch = sort(15).rows(0, 0, 6000)
    is_number = np.arange(30) < batch.lengths[:, None] // 2
    numbers = batch.inputs[..., 0][is_number]
    assert abs(numbers.mean()) < 0.018 and abs(numbers.var() - 1) < 0.025
