"""Matrix products over contiguous groups of rows, each group with a matrix of its own.

Legend: T rows (tokens), G groups, Q in, P out. `sizes` are the G lengths of the groups, one after the other.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def add_grouped_product(out_TP: Tensor, x_TQ: Tensor, matrices: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
    """Add x @ matrix to `out`, in place, group by group; the matrix of a group is [Q, P], None stands for zero."""
    for matrix_QP, out, x in zip(matrices, out_TP.split(sizes), x_TQ.split(sizes), strict=True):
        if matrix_QP is not None:
            out.addmm_(x, matrix_QP)


def add_to_groups(out_TP: Tensor, vectors: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
    """Add a vector [P] to all rows of each group, in place; None stands for zero."""
    for vector_P, out in zip(vectors, out_TP.split(sizes), strict=True):
        if vector_P is not None:
            out += vector_P


def grouped_product(x_TQ: Tensor, matrices: Iterable[Tensor | None], width: int, sizes: Sequence[int]) -> Tensor:
    """x @ matrix of each group, [T, width]; the matrix of a group is [Q, width], None stands for zero.

    A matrix is used before the next one is asked for.
    """
    out_TP = x_TQ.new_empty(len(x_TQ), width)
    for matrix_QP, out, x in zip(matrices, out_TP.split(sizes), x_TQ.split(sizes), strict=True):
        if matrix_QP is None:
            out.zero_()
        else:
            torch.mm(x, matrix_QP, out=out)
    return out_TP


def grouped_affine(
    x_TQ: Tensor, matrices: Iterable[Tensor | None], biases: Iterable[Tensor | None], width: int, sizes: Sequence[int]
) -> Tensor:
    """x @ matrix + bias of each group, [T, width]; the matrix of a group is [Q, width], None for rows of zeros.

    A matrix is used before the next one is asked for.
    """
    out_TP = x_TQ.new_empty(len(x_TQ), width)
    for matrix_QP, bias_P, out, x in zip(matrices, biases, out_TP.split(sizes), x_TQ.split(sizes), strict=True):
        if matrix_QP is None or bias_P is None:
            out.zero_()
        else:
            torch.addmm(bias_P, x, matrix_QP, out=out)
    return out_TP


def grouped_outer(out_GPQ: Tensor, left_TP: Tensor, right_TQ: Tensor, sizes: Sequence[int]) -> None:
    """Write the sum of outer products of the rows of each group, left^T @ right, to `out`."""
    for out, left, right in zip(out_GPQ.unbind(), left_TP.split(sizes), right_TQ.split(sizes), strict=True):
        torch.mm(left.t(), right, out=out)
