"""Matrix products over contiguous groups of rows, each group with a matrix of its own.

Legend: T rows (tokens), G groups, Q in, P out. `offsets` has G + 1 entries; group g is rows offsets[g] to offsets[g + 1].
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def add_grouped_product(out_TP: Tensor, x_TQ: Tensor, matrices: Sequence[Tensor | None], offsets: Sequence[int]) -> None:
    """Add x @ matrix to `out`, in place, group by group; the matrix of a group is [Q, P], None stands for zero."""
    for matrix_QP, (low, high) in zip(matrices, pairwise(offsets), strict=True):
        if matrix_QP is not None:
            out_TP[low:high].addmm_(x_TQ[low:high], matrix_QP)


def grouped_outer(out_GPQ: Tensor, left_TP: Tensor, right_TQ: Tensor, offsets: Sequence[int]) -> None:
    """Write the sum of outer products of the rows of each group, left^T @ right, to `out`."""
    for group, (low, high) in enumerate(pairwise(offsets)):
        torch.mm(left_TP[low:high].t(), right_TQ[low:high], out=out_GPQ[group])


def grouped_sum(out_GP: Tensor, x_TP: Tensor, offsets: Sequence[int]) -> None:
    """Write the sum of the rows of each group to `out`."""
    for group, (low, high) in enumerate(pairwise(offsets)):
        torch.sum(x_TP[low:high], dim=0, out=out_GP[group])
