"""The tree product on a CPU: nodes of the levels that are neither merged nor gathered are computed one by one.

Each token may give each level a factor of its own. Such a sum is not that of one matrix a leaf: no levels are merged then, so
that every full one costs a product of each token, forward and backward.

Legend: T tokens, Q in, P out, K depth, r rank, G nodes touched on a level, S rows stored.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from distcond.ops.gathered import add_gathered, gathered_backward
from distcond.ops.grouped import add_grouped_product, add_to_groups, grouped_outer, grouped_product
from distcond.ops.merged import bias_gradient, merged_product, merged_product_backward, weight_gradient
from distcond.ops.path import Level, NodeTensors, Schedule, TreePath, gradient_rows, pick, scale_from, scaled


def nodewise_forward(
    x_TQ: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    schedule: Schedule,
    scale_TK: Tensor | None = None,
) -> Tensor:
    """`tree_forward` for at least one token."""
    x_TQ, scale_TK = path.in_order(x_TQ), None if scale_TK is None else path.in_order(scale_TK)
    merged, first = schedule.merged if scale_TK is None else 0, schedule.gathered
    y_TP = merged_product(x_TQ, path.levels[: merged + 1], rows[: merged + 1], nodes.weight_SPQ, nodes.bias_SP)
    for number in range(merged + 1, first):
        level, rows_G = path.levels[number], rows[number]
        if number > schedule.full_depth:
            hidden_Tx = scaled(_hidden_units(x_TQ, level, rows_G, nodes), scale_TK, number)
            add_grouped_product(y_TP, hidden_Tx, pick(nodes.left_SxP, rows_G), level.sizes)
            continue
        add_grouped_product(y_TP, scaled(x_TQ, scale_TK, number), pick(nodes.weight_SPQ.mT, rows_G), level.sizes)
        if scale_TK is None:
            add_to_groups(y_TP, pick(nodes.bias_SP, rows_G), level.sizes)
        else:
            add_grouped_product(y_TP, scale_TK[:, number - 1 : number], pick(nodes.bias_SP[:, None], rows_G), level.sizes)
    if first < len(rows):
        add_gathered(y_TP, x_TQ, path.per_token(rows[first:]), nodes, scale_from(scale_TK, first))
    return y_TP.index_select(0, path.place_T)


def nodewise_backward(
    x_TQ: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    schedule: Schedule,
    gate_levels: Collection[int],
    out: NodeTensors,
    scale_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`tree_backward` for at least one token and no flips."""
    x_TQ, grad_TP = path.in_order(x_TQ), path.in_order(grad_TP)
    scale_TK = None if scale_TK is None else path.in_order(scale_TK)
    merged, first = schedule.merged if scale_TK is None else 0, schedule.gathered
    slots = gradient_rows(rows, schedule.full_depth)
    grad_levels_TK = x_TQ.new_zeros(len(x_TQ), len(rows) - 1)
    grad_x_TQ = merged_product_backward(grad_TP, path.levels[: merged + 1], rows[: merged + 1], nodes.weight_SPQ)
    for number in range(1, first):
        level, rows_G, slot = path.levels[number], rows[number], slots[number]
        is_full, is_wanted = number <= schedule.full_depth, number in gate_levels
        if is_full and number <= merged and not is_wanted:
            continue
        scaled_TP = scaled(grad_TP, scale_TK, number)
        if is_full:
            back_TQ = grouped_product(grad_TP, pick(nodes.weight_SPQ, rows_G), x_TQ.shape[1], level.sizes)
            if is_wanted:
                through_T1 = torch.linalg.vecdot(x_TQ, back_TQ)[:, None]
                add_grouped_product(through_T1, grad_TP, pick(nodes.bias_SP[:, :, None], rows_G), level.sizes)
                grad_levels_TK[:, number - 1] = through_T1[:, 0]
            if scale_TK is not None:
                scale_T1 = scale_TK[:, number - 1 : number]
                grad_x_TQ.addcmul_(back_TQ, scale_T1)
                grouped_outer(out.weight_SPQ[slot], scaled_TP, x_TQ, level.sizes)
                grouped_outer(out.bias_SP[slot, None], torch.ones_like(scale_T1), scaled_TP, level.sizes)
            elif number > merged:
                grad_x_TQ += back_TQ
        else:
            hidden_Tx = _hidden_units(x_TQ, level, rows_G, nodes)
            back_Tx = grouped_product(grad_TP, pick(nodes.left_SxP.mT, rows_G), hidden_Tx.shape[1], level.sizes)
            back_Tr = scaled(back_Tx[:, : nodes.right_SrQ.shape[1]], scale_TK, number)
            add_grouped_product(grad_x_TQ, back_Tr, pick(nodes.right_SrQ, rows_G), level.sizes)
            grouped_outer(out.right_SrQ[slot], back_Tr, x_TQ, level.sizes)
            grouped_outer(out.left_SxP[slot], hidden_Tx, scaled_TP, level.sizes)
            if is_wanted:
                grad_levels_TK[:, number - 1] = torch.linalg.vecdot(hidden_Tx, back_Tx)
    if first < len(rows):
        out.right_SrQ[slots[first].start :], out.left_SxP[slots[first].start :] = 0.0, 0.0
        per_token = path.per_token(rows[first:]), path.slots_per_token(slots[first:])
        through_TL = gathered_backward(grad_x_TQ, x_TQ, grad_TP, *per_token, nodes, out, scale_from(scale_TK, first))
        for number in range(first, len(rows)):
            if number in gate_levels:
                grad_levels_TK[:, number - 1] = through_TL[:, number - first]
    summed = path.levels[: schedule.full_depth + 1 if scale_TK is None else 1]  # the others are written above
    end = slots[len(summed) - 1].stop
    weight_gradient(x_TQ, grad_TP, summed, out.weight_SPQ[:end])
    bias_gradient(grad_TP, summed, out.bias_SP[:end])
    return grad_x_TQ.index_select(0, path.place_T), grad_levels_TK.index_select(0, path.place_T)


def _hidden_units(x_TQ: Tensor, level: Level, rows_G: Tensor, nodes: NodeTensors) -> Tensor:
    """Hidden units of the low-rank nodes of a level, [T, x]; the one of the bias is 1."""
    rank, width = nodes.right_SrQ.shape[1], nodes.left_SxP.shape[1]
    hidden_Tx = x_TQ.new_zeros(len(x_TQ), width)
    add_grouped_product(hidden_Tx[:, :rank], x_TQ, pick(nodes.right_SrQ.mT, rows_G), level.sizes)
    hidden_Tx[:, rank:] = 1.0
    return hidden_Tx
