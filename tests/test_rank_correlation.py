"""Spearman's rank correlation, by hand."""

import math

import numpy as np
import pytest

from distcond.rank_correlation import rank_correlation, ranks


def test_ranks_of_equal_numbers_are_the_mean_of_theirs() -> None:
    assert ranks(np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    assert rank_correlation(np.array([1, 2, 4]), np.array([9.0, 8.5, -1.0])) == pytest.approx(-1)
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([2, 1, 4, 3])) == pytest.approx(0.6)  # 1 - 6 x 4 / (4 x 15)


def test_rank_correlation_shares_ranks_among_equals() -> None:
    """Ranks 1.5, 1.5, 3 and 1, 2, 3 have covariance 1.5 and variances 1.5, 2."""
    assert rank_correlation(np.array([1, 1, 5]), np.array([0.1, 0.2, 9.0])) == pytest.approx(1.5 / 3**0.5)
    assert rank_correlation(np.array([1, 2, 3]), np.array([9.0, 8.0, 7.0])) == pytest.approx(-1)
    assert math.isnan(rank_correlation(np.array([2, 2]), np.array([1, 3])))
