"""The product of tokens with the sum of the matrices on their path through the tree, and its gradient.

Tokens are sorted by leaf once; the nodes of every level then own contiguous runs, because a leaf's prefixes are its
high bits. Shallow levels are added up and multiplied once, deep ones copied for each token, those between computed node
by node (`Schedule`).

Legend: T tokens, Q in, P out, K depth, r rank, G nodes touched on a level, S rows stored.
"""

from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from distcond.ops.gathered import add_gathered, gathered_backward
from distcond.ops.grouped import add_grouped_product, add_to_groups, grouped_outer, grouped_product, grouped_sum
from distcond.ops.path import Level, NodeTensors, Schedule, TreePath


class Merged(NamedTuple):
    """The sums of the matrices and biases from the root to each node of the last merged level."""

    weight_GPQ: Tensor
    bias_GP: Tensor


def tree_forward(
    x_TQ: Tensor, path: TreePath, rows: Sequence[Tensor], nodes: NodeTensors, schedule: Schedule
) -> tuple[Tensor, Merged]:
    """Sum of the products along each token's path, [T, P], in the order of x; and what the backward pass reuses.

    rows: per level, the stored row of each of its nodes, -1 where the node does not exist (which is a node of zeros).
    """
    if not len(x_TQ):
        return x_TQ.new_zeros(0, nodes.bias_SP.shape[1]), Merged(nodes.weight_SPQ[:0], nodes.bias_SP[:0])
    merged = _merge(path, rows, nodes, schedule.merged)
    if len(rows) == 1:
        return torch.nn.functional.linear(x_TQ, merged.weight_GPQ[0], merged.bias_GP[0]), merged
    x_TQ = x_TQ.index_select(0, path.order_T)
    sizes = path.levels[schedule.merged].sizes
    y_TP = grouped_product(x_TQ, merged.weight_GPQ.mT.unbind(), nodes.bias_SP.shape[1], sizes, merged.bias_GP.unbind())
    for number in range(schedule.merged + 1, schedule.gathered):
        level, rows_G = path.levels[number], rows[number]
        if number <= schedule.full_depth:
            add_grouped_product(y_TP, x_TQ, _pick(nodes.weight_SPQ.mT, rows_G), level.sizes)
            add_to_groups(y_TP, _pick(nodes.bias_SP, rows_G), level.sizes)
        else:
            add_grouped_product(y_TP, _hidden(x_TQ, level, rows_G, nodes), _pick(nodes.left_SxP, rows_G), level.sizes)
    if schedule.gathered < len(rows):
        add_gathered(y_TP, x_TQ, _per_token(path, rows, schedule.gathered), nodes)
    return _unsort(y_TP, path.order_T), merged


def tree_backward(
    x_TQ: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    schedule: Schedule,
    merged: Merged,
    gate_levels: Collection[int],
    out: NodeTensors,
) -> tuple[Tensor, Tensor]:
    """Gradients of `tree_forward` with respect to x, [T, Q], and to the level multipliers, [T, K].

    The multiplier of a level is the factor 1 that its contribution U_l x + c_l carries; the gates learn through it. It is
    computed for `gate_levels`, and zero for the others. Every row must exist (rows >= 0). out: written with the gradients
    of the touched nodes, the nodes of all levels of a kind one after the other. Those of full nodes are formed at the
    deepest full level and summed up the tree.
    """
    grad_levels_TK = x_TQ.new_zeros(len(x_TQ), len(rows) - 1)
    if not len(x_TQ):
        return torch.zeros_like(x_TQ), grad_levels_TK
    x_TQ, grad_TP = x_TQ.index_select(0, path.order_T), grad_TP.index_select(0, path.order_T)
    width = x_TQ.shape[1]
    grad_x_TQ = grouped_product(grad_TP, merged.weight_GPQ.unbind(), width, path.levels[schedule.merged].sizes)
    first_low = 0
    for number in range(1, schedule.gathered):
        level, rows_G, is_wanted = path.levels[number], rows[number], number in gate_levels
        if number <= schedule.full_depth:
            is_apart = number > schedule.merged
            if not is_wanted and not is_apart:
                continue
            back_TQ = grouped_product(grad_TP, _pick(nodes.weight_SPQ, rows_G), width, level.sizes)
            if is_apart:
                grad_x_TQ += back_TQ
            if is_wanted:
                through_T = torch.linalg.vecdot(x_TQ, back_TQ)[:, None]
                add_grouped_product(through_T, grad_TP, _pick(nodes.bias_SP[:, :, None], rows_G), level.sizes)
                grad_levels_TK[:, number - 1] = through_T[:, 0]
        else:
            part = slice(first_low, first_low := first_low + len(rows_G))
            hidden_Tx = _hidden(x_TQ, level, rows_G, nodes)
            back_Tx = grouped_product(grad_TP, _pick(nodes.left_SxP.mT, rows_G), hidden_Tx.shape[1], level.sizes)
            back_Tr = back_Tx[:, : nodes.right_SrQ.shape[1]]
            add_grouped_product(grad_x_TQ, back_Tr, _pick(nodes.right_SrQ, rows_G), level.sizes)
            grouped_outer(out.right_SrQ[part], back_Tr, x_TQ, level.sizes)
            grouped_outer(out.left_SxP[part], hidden_Tx, grad_TP, level.sizes)
            if is_wanted:
                grad_levels_TK[:, number - 1] = torch.linalg.vecdot(hidden_Tx, back_Tx)
    if schedule.gathered < len(rows):
        out.right_SrQ[first_low:], out.left_SxP[first_low:] = 0.0, 0.0
        bounds = accumulate((len(rows_G) for rows_G in rows[schedule.gathered :]), initial=first_low)
        slots = [torch.arange(*ends, device=x_TQ.device) for ends in pairwise(bounds)]
        rows_TL = _per_token(path, rows, schedule.gathered)
        slots_TL = _per_token(path, [*rows[: schedule.gathered], *slots], schedule.gathered)
        through_TL = gathered_backward(grad_x_TQ, x_TQ, grad_TP, rows_TL, slots_TL, nodes, out)
        for number in range(schedule.gathered, len(rows)):
            if number in gate_levels:
                grad_levels_TK[:, number - 1] = through_TL[:, number - schedule.gathered]
    _full_gradient(x_TQ, grad_TP, path.levels[: schedule.full_depth + 1], out)
    return _unsort(grad_x_TQ, path.order_T), _unsort(grad_levels_TK, path.order_T)


def _merge(path: TreePath, rows: Sequence[Tensor], nodes: NodeTensors, last: int) -> Merged:
    """Add up the levels from the root to the last."""
    merged = Merged(nodes.weight_SPQ.index_select(0, rows[0]), nodes.bias_SP.index_select(0, rows[0]))
    for level, rows_G in zip(path.levels[1 : last + 1], rows[1 : last + 1], strict=True):
        merged = Merged(
            _sum_with_parents(merged.weight_GPQ, level, nodes.weight_SPQ, rows_G),
            _sum_with_parents(merged.bias_GP, level, nodes.bias_SP, rows_G),
        )
    return merged


def _sum_with_parents(above: Tensor, level: Level, tensor_S: Tensor, rows_G: Tensor) -> Tensor:
    """The nodes of a level, each added to its parent's sum."""
    out = above.new_empty(len(rows_G), *above.shape[1:])
    for total, parent, node in zip(out.unbind(), level.parent_G.tolist(), _pick(tensor_S, rows_G), strict=True):
        if node is None:
            total.copy_(above[parent])
        else:
            torch.add(above[parent], node, out=total)
    return out


def _full_gradient(x_TQ: Tensor, grad_TP: Tensor, levels: Sequence[Level], out: NodeTensors) -> None:
    """Gradients of the full nodes from sorted tokens."""
    bounds = [0, *accumulate(len(level.nodes_G) for level in levels)]
    last, sizes = slice(bounds[-2], bounds[-1]), levels[-1].sizes
    grouped_outer(out.weight_SPQ[last], grad_TP, x_TQ, sizes)
    grouped_sum(out.bias_SP[last], grad_TP, sizes)
    for number in range(len(levels) - 1, 0, -1):
        upper, lower = slice(bounds[number - 1], bounds[number]), slice(bounds[number], bounds[number + 1])
        for tensor_S in (out.weight_SPQ, out.bias_SP):
            tensor_S[upper] = 0.0
            tensor_S[upper].index_add_(0, levels[number].parent_G, tensor_S[lower])


def _hidden(x_TQ: Tensor, level: Level, rows_G: Tensor, nodes: NodeTensors) -> Tensor:
    """Hidden units of the low-rank nodes of a level, [T, x]; the one of the bias is 1."""
    rank, width = nodes.right_SrQ.shape[1], nodes.left_SxP.shape[1]
    hidden_Tx = x_TQ.new_zeros(len(x_TQ), width)
    add_grouped_product(hidden_Tx[:, :rank], x_TQ, _pick(nodes.right_SrQ.mT, rows_G), level.sizes)
    hidden_Tx[:, rank:] = 1.0
    return hidden_Tx


def _pick(tensor_S: Tensor, rows_G: Tensor) -> list[Tensor | None]:
    """Views of single rows, None where the row is -1."""
    return [None if row < 0 else tensor_S[row] for row in rows_G.tolist()]


def _per_token(path: TreePath, values: Sequence[Tensor], first: int) -> Tensor:
    """Values of the nodes of the levels from `first` on, as values of sorted tokens, [T, L]."""
    levels = zip(path.levels[first:], values[first:], strict=True)
    return torch.stack([level.per_token(values_G) for level, values_G in levels], dim=1)


def _unsort(sorted_TX: Tensor, order_T: Tensor) -> Tensor:
    """Rows back in the order of the tokens."""
    return torch.empty_like(sorted_TX).index_copy_(0, order_T, sorted_TX)
