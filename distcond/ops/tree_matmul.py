"""The product of tokens with the sum of the matrices on their path through the tree, and its gradient.

Tokens are sorted by leaf once; the nodes of every level then own contiguous runs, because a leaf's prefixes are its
high bits. Shallow levels are added up and multiplied once, deep ones copied for each token, those between computed node
by node (`Schedule`).

Legend: T tokens, Q in, P out, K depth, r rank, G nodes touched on a level, S rows stored.
"""

from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from distcond.ops import fused, fused_rows, native
from distcond.ops.batched import batched_backward, batched_forward
from distcond.ops.batched_path import batched_path
from distcond.ops.flips import Flip
from distcond.ops.gathered import add_gathered, gathered_backward
from distcond.ops.grouped import add_grouped_product, add_to_groups, grouped_outer, grouped_product
from distcond.ops.merged import bias_gradient, merged_product, merged_product_backward, weight_gradient
from distcond.ops.path import Level, NodeTensors, Schedule, TreePath, calls_are_cheap, pick
from distcond.ops.per_level import PerLevel


def leaf_index(bits_TK: Tensor) -> Tensor:
    """Integer b_1 b_2 ... b_K of bool bits [..., K], b_1 most significant; int64 [...]."""
    depth = bits_TK.shape[-1]
    places_K = 2 ** torch.arange(depth - 1, -1, -1, device=bits_TK.device)
    return (bits_TK * places_K).sum(-1)


def tree_leaf(gates_TMK: Tensor) -> Tensor:
    """Leaves tree << K | b_1 b_2 ... b_K, int64 [T * M], of gates of M trees; a bit is whether its gate is above 0."""
    if native.computes(gates_TMK):
        return native.leaf_of(gates_TMK)
    if fused_rows.serves(gates_TMK):
        return fused_rows.leaf_of(gates_TMK)
    trees_M = torch.arange(gates_TMK.shape[1], device=gates_TMK.device)
    return (leaf_index(gates_TMK > 0) + (trees_M << gates_TMK.shape[2])).flatten()


def count_nonfinite(gates_TMK: Tensor) -> Tensor | int:
    """Tokens with a gate that is NaN or infinite, whose sign says nothing; a device is not waited for."""
    if native.computes(gates_TMK):
        return native.count_nonfinite(gates_TMK)
    # The sum of a row is finite where all its gates are (below 1e36), and a quarter of the work of looking at each.
    return torch.count_nonzero(~gates_TMK.detach().flatten(1).sum(1).isfinite())


def tree_path(leaf_T: Tensor, depth: int, num_trees: int = 1) -> TreePath:
    """`TreePath.of`, by the kernels that are chosen."""
    if len(leaf_T) and fused_rows.serves(leaf_T):
        return fused_rows.path_of(leaf_T, depth, num_trees)
    if not calls_are_cheap(leaf_T):
        return batched_path(leaf_T, depth, num_trees)
    if native.looks_up(leaf_T) and len(leaf_T):
        return native.path_of(leaf_T, depth, num_trees)
    return TreePath.of(leaf_T, depth, num_trees)


def computes_flips(x_TQ: Tensor, nodes: NodeTensors) -> bool:
    """Whether `tree_backward` takes flips, in time for one more product each; else a flip takes a forward pass of its own."""
    return native.serves(x_TQ, nodes)


def tree_forward(x_TQ: Tensor, path: TreePath, rows: Sequence[Tensor], nodes: NodeTensors, schedule: Schedule) -> Tensor:
    """Sum of the products along each token's path, [T, P], in the order of the leaves.

    x: one row a token, or in a forest one for all trees of a token (`TreePath.in_order`).
    rows: per level, the stored row of each of its nodes, -1 where the node does not exist (which is a node of zeros).
    """
    if not len(x_TQ):
        return x_TQ.new_zeros(0, nodes.bias_SP.shape[1])
    if fused.serves(x_TQ, path, nodes):
        return fused.fused_forward(x_TQ, path, PerLevel.of(rows), nodes, schedule.full_depth)
    if not calls_are_cheap(x_TQ):
        return batched_forward(x_TQ, path, rows, nodes, schedule)
    if native.serves(x_TQ, nodes):
        return native.forward(x_TQ, path, rows, nodes, schedule.full_depth)
    if len(rows) == 1 and len(rows[0]) == 1:
        root = int(rows[0])
        return torch.nn.functional.linear(x_TQ, nodes.weight_SPQ[root], nodes.bias_SP[root])
    x_TQ = path.in_order(x_TQ)
    shallow = slice(schedule.merged + 1)
    y_TP = merged_product(x_TQ, path.levels[shallow], rows[shallow], nodes.weight_SPQ, nodes.bias_SP)
    for number in range(schedule.merged + 1, schedule.gathered):
        level, rows_G = path.levels[number], rows[number]
        if number <= schedule.full_depth:
            add_grouped_product(y_TP, x_TQ, pick(nodes.weight_SPQ.mT, rows_G), level.sizes)
            add_to_groups(y_TP, pick(nodes.bias_SP, rows_G), level.sizes)
        else:
            add_grouped_product(y_TP, hidden_units(x_TQ, level, rows_G, nodes), pick(nodes.left_SxP, rows_G), level.sizes)
    if schedule.gathered < len(rows):
        add_gathered(y_TP, x_TQ, values_per_token(path, rows, schedule.gathered), nodes)
    return y_TP.index_select(0, path.place_T)


def tree_backward(
    x_TQ: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    schedule: Schedule,
    gate_levels: Collection[int],
    out: NodeTensors,
    flips: Sequence[Flip] = (),
) -> tuple[Tensor, Tensor]:
    """Gradients of `tree_forward` with respect to each token's x, [T, Q], and to the level multipliers, [T, K].

    The multiplier of a level is the factor 1 that its contribution U_l x + c_l carries; the gates learn through it. It is
    computed for `gate_levels`, and zero for the others. Every row must exist (rows >= 0). out: written with the gradients
    of the touched nodes, the nodes of all levels of a kind one after the other. Those of full nodes are formed at the
    deepest full level and summed up the tree. flips: of the levels of these, instead, the gradient to a factor of what y would
    change by if the bit were the other one; where `computes_flips` alone.
    """
    if not len(x_TQ):
        return torch.zeros_like(x_TQ), x_TQ.new_zeros(0, len(rows) - 1)
    if fused.serves(x_TQ, path, nodes):
        return fused.fused_backward(x_TQ, grad_TP, path, PerLevel.of(rows), nodes, schedule.full_depth, gate_levels, out)
    if not calls_are_cheap(x_TQ):
        return batched_backward(x_TQ, grad_TP, path, rows, nodes, schedule, gate_levels, out)
    if native.serves(x_TQ, nodes):
        return native.backward(x_TQ, grad_TP, path, rows, nodes, schedule.full_depth, gate_levels, out, flips)
    assert not flips
    x_TQ, grad_TP = path.in_order(x_TQ), path.in_order(grad_TP)
    grad_levels_TK = x_TQ.new_zeros(len(x_TQ), len(rows) - 1)
    width, shallow = x_TQ.shape[1], slice(schedule.merged + 1)
    grad_x_TQ = merged_product_backward(grad_TP, path.levels[shallow], rows[shallow], nodes.weight_SPQ)
    first_low = 0
    for number in range(1, schedule.gathered):
        level, rows_G, is_wanted = path.levels[number], rows[number], number in gate_levels
        if number <= schedule.full_depth:
            is_apart = number > schedule.merged
            if not is_wanted and not is_apart:
                continue
            back_TQ = grouped_product(grad_TP, pick(nodes.weight_SPQ, rows_G), width, level.sizes)
            if is_apart:
                grad_x_TQ += back_TQ
            if is_wanted:
                through_T = torch.linalg.vecdot(x_TQ, back_TQ)[:, None]
                add_grouped_product(through_T, grad_TP, pick(nodes.bias_SP[:, :, None], rows_G), level.sizes)
                grad_levels_TK[:, number - 1] = through_T[:, 0]
        else:
            part = slice(first_low, first_low := first_low + len(rows_G))
            hidden_Tx = hidden_units(x_TQ, level, rows_G, nodes)
            back_Tx = grouped_product(grad_TP, pick(nodes.left_SxP.mT, rows_G), hidden_Tx.shape[1], level.sizes)
            back_Tr = back_Tx[:, : nodes.right_SrQ.shape[1]]
            add_grouped_product(grad_x_TQ, back_Tr, pick(nodes.right_SrQ, rows_G), level.sizes)
            grouped_outer(out.right_SrQ[part], back_Tr, x_TQ, level.sizes)
            grouped_outer(out.left_SxP[part], hidden_Tx, grad_TP, level.sizes)
            if is_wanted:
                grad_levels_TK[:, number - 1] = torch.linalg.vecdot(hidden_Tx, back_Tx)
    if schedule.gathered < len(rows):
        out.right_SrQ[first_low:], out.left_SxP[first_low:] = 0.0, 0.0
        bounds = accumulate((len(rows_G) for rows_G in rows[schedule.gathered :]), initial=first_low)
        slots = [torch.arange(*ends, device=x_TQ.device) for ends in pairwise(bounds)]
        rows_TL = values_per_token(path, rows, schedule.gathered)
        slots_TL = values_per_token(path, [*rows[: schedule.gathered], *slots], schedule.gathered)
        through_TL = gathered_backward(grad_x_TQ, x_TQ, grad_TP, rows_TL, slots_TL, nodes, out)
        for number in range(schedule.gathered, len(rows)):
            if number in gate_levels:
                grad_levels_TK[:, number - 1] = through_TL[:, number - schedule.gathered]
    full = path.levels[: schedule.full_depth + 1]
    weight_gradient(x_TQ, grad_TP, full, out.weight_SPQ)
    bias_gradient(grad_TP, full, out.bias_SP)
    return grad_x_TQ.index_select(0, path.place_T), grad_levels_TK.index_select(0, path.place_T)


def hidden_units(x_TQ: Tensor, level: Level, rows_G: Tensor, nodes: NodeTensors) -> Tensor:
    """Hidden units of the low-rank nodes of a level, [T, x]; the one of the bias is 1."""
    rank, width = nodes.right_SrQ.shape[1], nodes.left_SxP.shape[1]
    hidden_Tx = x_TQ.new_zeros(len(x_TQ), width)
    add_grouped_product(hidden_Tx[:, :rank], x_TQ, pick(nodes.right_SrQ.mT, rows_G), level.sizes)
    hidden_Tx[:, rank:] = 1.0
    return hidden_Tx


def values_per_token(path: TreePath, values: Sequence[Tensor], first: int) -> Tensor:
    """Values of the nodes of the levels from `first` on, as values of sorted tokens, [T, L]."""
    levels = zip(path.levels[first:], values[first:], strict=True)
    return torch.stack([level.per_token(values_G) for level, values_G in levels], dim=1)
