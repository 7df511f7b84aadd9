"""distcond.ops.PerLevel: one tensor for all levels is the same as one for each."""

import pytest
import torch

from distcond.ops import PerLevel

LEVELS = [torch.tensor(values, dtype=torch.int64) for values in ([7], [3, 1], [], [4, 1, 5])]
VALUES = PerLevel.of(LEVELS)


def test_it_is_the_sequence_of_its_levels() -> None:
    assert VALUES.flat_N.tolist() == [7, 3, 1, 4, 1, 5] and VALUES.sizes == [1, 2, 0, 3]
    assert [part.tolist() for part in VALUES] == [level.tolist() for level in LEVELS]
    assert VALUES[-1].tolist() == [4, 1, 5] and [part.tolist() for part in VALUES[:2]] == [[7], [3, 1]]
    assert PerLevel.of(VALUES) is VALUES


@pytest.mark.parametrize("level", range(6))
def test_it_splits_between_levels_and_behind_the_last(level: int) -> None:
    expected = [[value for part in parts for value in part.tolist()] for parts in (LEVELS[:level], LEVELS[level:])]
    assert [part.tolist() for part in VALUES.split(level)] == expected
