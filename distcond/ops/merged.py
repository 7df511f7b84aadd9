"""The shallow levels of a tree, whose nodes have many tokens each: added up along the path, and multiplied once.

The tree is walked depth first, so that a node is read once from memory and the sums of its ancestors are still in the
cache; likewise for the gradient, which is formed at the last level and added up the tree while it is there.

Legend: T tokens, G nodes touched on the last level, Q in, P out, S rows stored.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from distcond.ops.grouped import grouped_affine, grouped_product
from distcond.ops.path import Level, pick


def merged_product(x_TQ: Tensor, levels: Sequence[Level], rows: Sequence[Tensor], weight_SPQ: Tensor, bias_SP: Tensor) -> Tensor:
    """Products of sorted tokens with the sums of matrices and biases from the root to their nodes, [T, P].

    levels, rows: from the roots to the last merged level; rows of -1 are nodes of zeros. Every root exists.
    """
    bias_GP = bias_SP.index_select(0, rows[0])
    for level, rows_G in zip(levels[1:], rows[1:], strict=True):
        node_GP = torch.where(rows_G[:, None] >= 0, bias_SP.index_select(0, rows_G.clamp(min=0)), 0.0)
        bias_GP = node_GP.add_(bias_GP.index_select(0, level.parent_G))
    matrices = (weight_PQ.t() for weight_PQ in path_sums(levels, rows, weight_SPQ))
    return grouped_affine(x_TQ, matrices, bias_GP.unbind(), bias_SP.shape[1], levels[-1].sizes)


def merged_product_backward(grad_TP: Tensor, levels: Sequence[Level], rows: Sequence[Tensor], weight_SPQ: Tensor) -> Tensor:
    """Gradient of `merged_product` with respect to x, [T, Q]."""
    return grouped_product(grad_TP, path_sums(levels, rows, weight_SPQ), weight_SPQ.shape[2], levels[-1].sizes)


def path_sums(levels: Sequence[Level], rows: Sequence[Tensor], tensor_S: Tensor) -> Iterator[Tensor]:
    """For each node of the last level, in order, the sum of the rows from the root to it; the next one overwrites it."""
    nodes = [pick(tensor_S, rows_G) for rows_G in rows]
    buffers = [tensor_S.new_empty(tensor_S.shape[1:]) for _ in rows]
    sums = list(buffers)
    for first, chain in _chains(levels):
        if first == 0:
            root = nodes[0][chain[0]]
            assert root is not None
            sums[0] = root
        for number in range(max(1, first), len(levels)):
            node = nodes[number][chain[number]]
            above = sums[number - 1]
            sums[number] = above if node is None else torch.add(above, node, out=buffers[number])
        yield sums[-1]


def weight_gradient(x_TQ: Tensor, grad_TP: Tensor, levels: Sequence[Level], out_SPQ: Tensor) -> None:
    """Gradients of the matrices of all nodes of these levels, in their order; a parent's is the sum of its children's."""
    parents, starts = [level.parent_G.tolist() for level in levels], _starts(levels)
    parts = zip(grad_TP.split(levels[-1].sizes), x_TQ.split(levels[-1].sizes), strict=True)
    for leaf, (grad, x) in enumerate(parts):
        torch.mm(grad.t(), x, out=out_SPQ[starts[-1] + leaf])
        node = leaf
        for number in range(len(levels) - 1, 0, -1):
            siblings, parent = parents[number], parents[number][node]
            total, part = out_SPQ[starts[number - 1] + parent], out_SPQ[starts[number] + node]
            is_first = node == 0 or siblings[node - 1] != parent
            total.copy_(part) if is_first else total.add_(part)
            if siblings[node + 1 : node + 2] == [parent]:
                break  # the parent's is complete with the next one
            node = parent


def bias_gradient(grad_TP: Tensor, levels: Sequence[Level], out_SP: Tensor) -> None:
    """The same for their biases."""
    starts = _starts(levels)
    out_SP.zero_()
    if len(levels[-1].nodes_G) == 1:  # as nn.Linear has it, bit for bit
        torch.sum(grad_TP, dim=0, out=out_SP[starts[-1]])
    else:
        group_T = levels[-1].per_token(torch.arange(len(levels[-1].nodes_G), device=grad_TP.device))
        out_SP[starts[-1] :].index_add_(0, group_T, grad_TP)
    for number in range(len(levels) - 1, 0, -1):
        end = starts[number] + len(levels[number].nodes_G)
        out_SP[starts[number - 1] : starts[number]].index_add_(0, levels[number].parent_G, out_SP[starts[number] : end])


def _starts(levels: Sequence[Level]) -> list[int]:
    """Place of the first node of each level among those of all."""
    return [0, *accumulate(len(level.nodes_G) for level in levels[:-1])]


def _chains(levels: Sequence[Level]) -> Iterator[tuple[int, list[int]]]:
    """For each node of the last level: the first level on which its path leaves that of the node before, and the path."""
    parents = [level.parent_G.tolist() for level in levels]
    before = [-1] * len(levels)
    for leaf in range(len(levels[-1].nodes_G)):
        chain = [leaf] * len(levels)
        for number in range(len(levels) - 1, 0, -1):
            chain[number - 1] = parents[number][chain[number]]
        first = next(number for number in range(len(levels)) if chain[number] != before[number])
        yield first, chain
        before = chain
