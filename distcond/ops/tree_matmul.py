"""The product of tokens with the sum of the matrices on their path through the tree, and its gradient.

Tokens are sorted by leaf once; the nodes of every level then own contiguous runs, because a leaf's prefixes are its
high bits. Levels up to `full_depth` hold full matrices, deeper ones low-rank factors.

Legend: T tokens, Q in, P out, K depth, r rank, G nodes touched on a level, S rows stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from distcond.ops.grouped import add_grouped_product, grouped_outer, grouped_sum


class NodeTensors(NamedTuple):
    """Nodes of both kinds; a row index means the same in all tensors of its kind. A low-rank weight is left^T @ right."""

    weight_SPQ: Tensor
    bias_SP: Tensor
    right_SrQ: Tensor
    left_SxP: Tensor
    "x = r, or r + 1 where nodes have a bias: the last row, as if a hidden unit were always 1."


@dataclass(slots=True)
class Level:
    """The nodes of one level that tokens visit, in the order of the sorted tokens."""

    nodes_G: Tensor
    "int64, heap order: 2**level - 1 + prefix, ascending."
    parent_G: Tensor
    "int64, index of each node's parent among the nodes of the level above."
    offsets: list[int]
    "G + 1 bounds of the runs of sorted tokens."


@dataclass(slots=True)
class TreePath:
    """Tokens sorted by leaf, and the nodes they pass on every level."""

    order_T: Tensor
    "int64, sorted position -> token."
    levels: list[Level]
    "K + 1 levels, the root first."

    @classmethod
    def of(cls, leaf_T: Tensor, depth: int) -> "TreePath":
        """Path of int64 leaf indices in [0, 2**depth)."""
        sorted_T, order_T = torch.sort(leaf_T, stable=True)
        prefix_G, counts_G = torch.unique_consecutive(sorted_T, return_counts=True)
        levels: list[Level] = []
        for level in range(depth, -1, -1):
            up_G, parent_G, up_sizes = torch.unique_consecutive(prefix_G >> 1, return_inverse=True, return_counts=True)
            offsets = [0, *accumulate(counts_G.tolist())]
            levels.append(Level(nodes_G=prefix_G + (2**level - 1), parent_G=parent_G, offsets=offsets))
            counts_G = torch.zeros_like(up_sizes).index_add_(0, parent_G, counts_G)
            prefix_G = up_G
        return cls(order_T=order_T, levels=levels[::-1])


def tree_forward(x_TQ: Tensor, path: TreePath, rows: Sequence[Tensor], nodes: NodeTensors, full_depth: int) -> Tensor:
    """Sum of the products along each token's path, [T, P], in the order of x.

    rows: per level, the stored row of each of its nodes, -1 where the node does not exist (which is a node of zeros).
    """
    if not len(x_TQ):
        return x_TQ.new_zeros(0, nodes.bias_SP.shape[1])
    root = int(rows[0][0])
    y_TP = torch.nn.functional.linear(x_TQ, nodes.weight_SPQ[root], nodes.bias_SP[root])
    if len(rows) == 1:
        return y_TP
    sorted_TQ, deep_TP = x_TQ.index_select(0, path.order_T), torch.zeros_like(y_TP)
    bias_GP = nodes.bias_SP.new_zeros(1, y_TP.shape[1])
    for number, (level, rows_G) in enumerate(zip(path.levels[1:], rows[1:], strict=True), start=1):
        bias_GP = bias_GP.index_select(0, level.parent_G)
        if number <= full_depth:
            add_grouped_product(deep_TP, sorted_TQ, _pick(nodes.weight_SPQ.mT, rows_G), level.offsets)
            _add_rows(bias_GP, nodes.bias_SP, rows_G)
        else:
            add_grouped_product(deep_TP, _hidden(sorted_TQ, level, rows_G, nodes), _pick(nodes.left_SxP, rows_G), level.offsets)
    for bias_P, (low, high) in zip(bias_GP, pairwise(path.levels[-1].offsets), strict=True):
        deep_TP[low:high] += bias_P
    return y_TP.index_add_(0, path.order_T, deep_TP)


def tree_backward(
    x_TQ: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    full_depth: int,
    out: NodeTensors,
) -> tuple[Tensor, Tensor]:
    """Gradients of `tree_forward` with respect to x, [T, Q], and to the level multipliers, [T, K].

    The multiplier of a level is the factor 1 that its contribution U_l x + c_l carries; the gates learn through it.
    Every row must exist (rows >= 0). out: written with the gradients of the touched nodes, the nodes of all levels of a
    kind one after the other. Those of full nodes are formed at the deepest full level and summed up the tree.
    """
    if not len(x_TQ):
        return torch.zeros_like(x_TQ), x_TQ.new_zeros(0, len(rows) - 1)
    x_TQ, grad_TP = x_TQ.index_select(0, path.order_T), grad_TP.index_select(0, path.order_T)
    grad_x_TQ = grad_TP @ nodes.weight_SPQ[int(rows[0][0])]
    grad_levels_TK = x_TQ.new_zeros(len(x_TQ), len(rows) - 1)
    first_low = 0
    for number, (level, rows_G) in enumerate(zip(path.levels[1:], rows[1:], strict=True), start=1):
        if number <= full_depth:
            back_TQ = _product(grad_TP, _pick(nodes.weight_SPQ, rows_G), x_TQ.shape[1], level.offsets)
            through_T = _product(grad_TP, _pick(nodes.bias_SP[:, :, None], rows_G), 1, level.offsets)[:, 0]
            through_T += torch.linalg.vecdot(x_TQ, back_TQ)
            grad_x_TQ += back_TQ
        else:
            part = slice(first_low, first_low := first_low + len(rows_G))
            hidden_Tx = _hidden(x_TQ, level, rows_G, nodes)
            back_Tx = _product(grad_TP, _pick(nodes.left_SxP.mT, rows_G), hidden_Tx.shape[1], level.offsets)
            back_Tr = back_Tx[:, : nodes.right_SrQ.shape[1]]
            add_grouped_product(grad_x_TQ, back_Tr, _pick(nodes.right_SrQ, rows_G), level.offsets)
            through_T = torch.linalg.vecdot(hidden_Tx, back_Tx)
            grouped_outer(out.right_SrQ[part], back_Tr, x_TQ, level.offsets)
            grouped_outer(out.left_SxP[part], hidden_Tx, grad_TP, level.offsets)
        grad_levels_TK[:, number - 1] = through_T
    _full_gradient(x_TQ, grad_TP, path.levels[: full_depth + 1], out)
    return _unsort(grad_x_TQ, path.order_T), _unsort(grad_levels_TK, path.order_T)


def _full_gradient(x_TQ: Tensor, grad_TP: Tensor, levels: Sequence[Level], out: NodeTensors) -> None:
    """Gradients of the full nodes from sorted tokens."""
    bounds = [0, *accumulate(len(level.nodes_G) for level in levels)]
    last, offsets = slice(bounds[-2], bounds[-1]), levels[-1].offsets
    grouped_outer(out.weight_SPQ[last], grad_TP, x_TQ, offsets)
    grouped_sum(out.bias_SP[last], grad_TP, offsets)
    for number in range(len(levels) - 1, 0, -1):
        upper, lower = slice(bounds[number - 1], bounds[number]), slice(bounds[number], bounds[number + 1])
        for tensor_S in (out.weight_SPQ, out.bias_SP):
            tensor_S[upper] = 0.0
            tensor_S[upper].index_add_(0, levels[number].parent_G, tensor_S[lower])


def _hidden(x_TQ: Tensor, level: Level, rows_G: Tensor, nodes: NodeTensors) -> Tensor:
    """Hidden units of the low-rank nodes of a level, [T, x]; the one of the bias is 1."""
    rank, width = nodes.right_SrQ.shape[1], nodes.left_SxP.shape[1]
    hidden_Tx = x_TQ.new_zeros(len(x_TQ), width)
    add_grouped_product(hidden_Tx[:, :rank], x_TQ, _pick(nodes.right_SrQ.mT, rows_G), level.offsets)
    hidden_Tx[:, rank:] = 1.0
    return hidden_Tx


def _pick(tensor_S: Tensor, rows_G: Tensor) -> list[Tensor | None]:
    """Views of single rows, None where the row is -1."""
    return [None if row < 0 else tensor_S[row] for row in rows_G.tolist()]


def _add_rows(total_GP: Tensor, tensor_SP: Tensor, rows_G: Tensor) -> None:
    """Add a row of the tensor to each row of the total, nothing where the row is -1."""
    for total_P, row in zip(total_GP, rows_G.tolist(), strict=True):
        if row >= 0:
            total_P += tensor_SP[row]


def _product(x_TQ: Tensor, matrices: Sequence[Tensor | None], width: int, offsets: Sequence[int]) -> Tensor:
    out_TP = x_TQ.new_zeros(len(x_TQ), width)
    add_grouped_product(out_TP, x_TQ, matrices, offsets)
    return out_TP


def _unsort(sorted_TX: Tensor, order_T: Tensor) -> Tensor:
    """Rows back in the order of the tokens."""
    return torch.empty_like(sorted_TX).index_copy_(0, order_T, sorted_TX)
