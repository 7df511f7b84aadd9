"""The product of tokens with the sum of the matrices on their path through the tree, and its gradient.

Tokens are sorted by leaf once; the nodes of every level then own contiguous runs, because a leaf's prefixes are its
high bits. Shallow levels are added up and multiplied once, deep ones copied for each token, those between computed node
by node (`Schedule`).

Legend: T tokens, Q in, P out, K depth, r rank, G nodes touched on a level, S rows stored.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from distcond.ops import fused, fused_rows, native
from distcond.ops.batched import batched_backward, batched_forward
from distcond.ops.batched_path import batched_path
from distcond.ops.flips import Flip
from distcond.ops.nodewise import nodewise_backward, nodewise_forward
from distcond.ops.path import NodeTensors, Schedule, TreePath, calls_are_cheap
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


def tree_forward(
    x_TQ: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    schedule: Schedule,
    scale_TK: Tensor | None = None,
) -> Tensor:
    """Sum of the products along each token's path, [T, P], in the order of the leaves.

    x: one row a token, or in a forest one for all trees of a token (`TreePath.in_order`).
    rows: per level, the stored row of each of its nodes, -1 where the node does not exist (which is a node of zeros).
    scale: what each token multiplies U_l x + c_l of every level below the root by; None: 1.
    """
    if not len(x_TQ):
        return x_TQ.new_zeros(0, nodes.bias_SP.shape[1])
    if scale_TK is None and fused.serves(x_TQ, path, nodes):
        return fused.fused_forward(x_TQ, path, PerLevel.of(rows), nodes, schedule.full_depth)
    if not calls_are_cheap(x_TQ):
        return batched_forward(x_TQ, path, rows, nodes, schedule, scale_TK)
    if scale_TK is None and native.serves(x_TQ, nodes):
        return native.forward(x_TQ, path, rows, nodes, schedule.full_depth)
    if len(rows) == 1 and len(rows[0]) == 1:
        root = int(rows[0])
        return torch.nn.functional.linear(x_TQ, nodes.weight_SPQ[root], nodes.bias_SP[root])
    return nodewise_forward(x_TQ, path, rows, nodes, schedule, scale_TK)


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
    scale_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `tree_forward` with respect to each token's x, [T, Q], and to the level multipliers, [T, K].

    The multiplier of a level is the factor that its contribution U_l x + c_l carries, 1 or the scale; the gates learn through it.
    It is computed for `gate_levels`, and zero for the others. Every row must exist (rows >= 0). out: written with the gradients
    of the touched nodes, the nodes of all levels of a kind one after the other. Those of full nodes are formed at the
    deepest full level and summed up the tree, with a scale at each level. flips: of the levels of these, instead, the gradient
    to a factor of what y would change by if the bit were the other one; where `computes_flips` alone.
    """
    if not len(x_TQ):
        return torch.zeros_like(x_TQ), x_TQ.new_zeros(0, len(rows) - 1)
    if scale_TK is None and fused.serves(x_TQ, path, nodes):
        return fused.fused_backward(x_TQ, grad_TP, path, PerLevel.of(rows), nodes, schedule.full_depth, gate_levels, out)
    if not calls_are_cheap(x_TQ):
        return batched_backward(x_TQ, grad_TP, path, rows, nodes, schedule, gate_levels, out, scale_TK)
    if scale_TK is None and native.serves(x_TQ, nodes):
        return native.backward(x_TQ, grad_TP, path, rows, nodes, schedule.full_depth, gate_levels, out, flips)
    assert not flips
    return nodewise_backward(x_TQ, grad_TP, path, rows, nodes, schedule, gate_levels, out, scale_TK)
