"""Spearman's rank correlation, also of one order of many numbers with many."""

import numpy as np

Array = np.ndarray


def ranks(values: Array) -> Array:
    """Rank of each number from 1, float64; equal ones share the mean of theirs."""
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[index])


def rank_correlation(left: Array, right: Array) -> float:
    """Spearman's, of two arrays as long; NaN if all numbers of one are equal."""
    return float(rank_scores(left) @ rank_scores(right))


def rank_scores(values: Array) -> Array:
    """Ranks, centred, of norm 1: the inner product of two is their correlation."""
    centred = ranks(values) - (len(values) + 1) / 2
    with np.errstate(invalid="ignore"):
        return np.asarray(centred / np.linalg.norm(centred))
