"""The product of tokens with their path where each token gives each level a factor of its own.

Such a sum is not that of one matrix a leaf: nothing can be added up before it is multiplied, so that every full level costs
a product of each token, forward and backward. Deep levels are gathered as elsewhere.

Legend: T tokens, Q in, P out, K depth, r rank, G nodes touched on a level, L levels gathered.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from distcond.ops.batched import batched_backward, batched_forward
from distcond.ops.gathered import add_gathered, gathered_backward
from distcond.ops.grouped import add_grouped_product, grouped_outer, grouped_product
from distcond.ops.merged import bias_gradient, merged_product, merged_product_backward, weight_gradient
from distcond.ops.path import NodeTensors, Schedule, TreePath, calls_are_cheap, pick
from distcond.ops.tree_matmul import hidden_units, values_per_token


def scaled_forward(
    x_TQ: Tensor, scale_TK: Tensor, path: TreePath, rows: Sequence[Tensor], nodes: NodeTensors, schedule: Schedule
) -> Tensor:
    """The root's product plus the sum of scale_l (U_l x + c_l) along each token's path, [T, P]; else as `tree_forward`."""
    if not len(x_TQ):
        return x_TQ.new_zeros(0, nodes.bias_SP.shape[1])
    if not calls_are_cheap(x_TQ):
        return batched_forward(x_TQ, path, rows, nodes, schedule, scale_TK)
    x_TQ, scale_TK = path.in_order(x_TQ), path.in_order(scale_TK)
    y_TP = merged_product(x_TQ, path.levels[:1], rows[:1], nodes.weight_SPQ, nodes.bias_SP)
    for number in range(1, schedule.gathered):
        level, rows_G, scale_T1 = path.levels[number], rows[number], scale_TK[:, number - 1 : number]
        if number <= schedule.full_depth:
            add_grouped_product(y_TP, x_TQ * scale_T1, pick(nodes.weight_SPQ.mT, rows_G), level.sizes)
            add_grouped_product(y_TP, scale_T1, pick(nodes.bias_SP[:, None], rows_G), level.sizes)
        else:
            hidden_Tx = hidden_units(x_TQ, level, rows_G, nodes) * scale_T1
            add_grouped_product(y_TP, hidden_Tx, pick(nodes.left_SxP, rows_G), level.sizes)
    if schedule.gathered < len(rows):
        rows_TL = values_per_token(path, rows, schedule.gathered)
        add_gathered(y_TP, x_TQ, rows_TL, nodes, scale_TK[:, schedule.gathered - 1 :])
    return y_TP.index_select(0, path.place_T)


def scaled_backward(
    x_TQ: Tensor,
    scale_TK: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    schedule: Schedule,
    out: NodeTensors,
) -> tuple[Tensor, Tensor]:
    """Gradients of `scaled_forward` for each token's x, [T, Q], and the scale, [T, K]; `out` as in `tree_backward`."""
    grad_scale_TK = torch.zeros_like(scale_TK)
    if not len(x_TQ):
        return torch.zeros_like(x_TQ), grad_scale_TK
    if not calls_are_cheap(x_TQ):
        levels = range(1, len(rows))
        return batched_backward(x_TQ, grad_TP, path, rows, nodes, schedule, levels, out, scale_TK)
    x_TQ, grad_TP, scale_TK = (path.in_order(part) for part in (x_TQ, grad_TP, scale_TK))
    width, rank, slots = x_TQ.shape[1], nodes.right_SrQ.shape[1], _slots(rows, schedule.full_depth)
    grad_x_TQ = merged_product_backward(grad_TP, path.levels[:1], rows[:1], nodes.weight_SPQ)
    weight_gradient(x_TQ, grad_TP, path.levels[:1], out.weight_SPQ[slots[0]])
    bias_gradient(grad_TP, path.levels[:1], out.bias_SP[slots[0]])
    for number in range(1, schedule.gathered):
        level, rows_G, part, scale_T1 = path.levels[number], rows[number], slots[number], scale_TK[:, number - 1 : number]
        scaled_TP = grad_TP * scale_T1
        if number <= schedule.full_depth:
            back_TQ = grouped_product(grad_TP, pick(nodes.weight_SPQ, rows_G), width, level.sizes)
            through_T1 = torch.linalg.vecdot(x_TQ, back_TQ)[:, None]
            add_grouped_product(through_T1, grad_TP, pick(nodes.bias_SP[:, :, None], rows_G), level.sizes)
            grad_scale_TK[:, number - 1] = through_T1[:, 0]
            grad_x_TQ.addcmul_(back_TQ, scale_T1)
            grouped_outer(out.weight_SPQ[part], scaled_TP, x_TQ, level.sizes)
            grouped_outer(out.bias_SP[part, None], torch.ones_like(scale_T1), scaled_TP, level.sizes)
        else:
            hidden_Tx = hidden_units(x_TQ, level, rows_G, nodes)
            back_Tx = grouped_product(grad_TP, pick(nodes.left_SxP.mT, rows_G), hidden_Tx.shape[1], level.sizes)
            grad_scale_TK[:, number - 1] = torch.linalg.vecdot(hidden_Tx, back_Tx)
            back_Tr = back_Tx[:, :rank] * scale_T1
            add_grouped_product(grad_x_TQ, back_Tr, pick(nodes.right_SrQ, rows_G), level.sizes)
            grouped_outer(out.right_SrQ[part], back_Tr, x_TQ, level.sizes)
            grouped_outer(out.left_SxP[part], hidden_Tx, scaled_TP, level.sizes)
    first = schedule.gathered
    if first < len(rows):
        gathered = slice(slots[first].start, None)
        out.right_SrQ[gathered], out.left_SxP[gathered] = 0.0, 0.0
        places = [torch.arange(slot.start, slot.stop, device=x_TQ.device) for slot in slots]
        rows_TL, slots_TL = values_per_token(path, rows, first), values_per_token(path, places, first)
        deep = (grad_x_TQ, x_TQ, grad_TP, rows_TL, slots_TL, nodes, out, scale_TK[:, first - 1 :])
        grad_scale_TK[:, first - 1 :] = gathered_backward(*deep)
    return grad_x_TQ.index_select(0, path.place_T), grad_scale_TK.index_select(0, path.place_T)


def _slots(rows: Sequence[Tensor], full_depth: int) -> list[slice]:
    """Rows of each level in a gradient, in which the nodes of all levels of a kind follow each other."""
    kinds = (rows[: full_depth + 1], rows[full_depth + 1 :])
    return [slice(*ends) for kind in kinds for ends in pairwise(accumulate((len(rows_G) for rows_G in kind), initial=0))]
