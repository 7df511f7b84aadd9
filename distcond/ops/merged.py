"""The shallow levels of a tree, whose nodes have many tokens each: added up along the path, and multiplied once.

The tree is walked depth first, so that a node is read once from memory and the sums of its ancestors are still in the
cache; likewise for the gradient, which is formed at the last level and added up the tree while it is there.

Legend: T tokens, G nodes touched on the last level, Q in, P out, S rows stored.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from distcond.ops.path import Level, pick


def merged_product(x_TQ: Tensor, levels: Sequence[Level], rows: Sequence[Tensor], weight_SPQ: Tensor, bias_SP: Tensor) -> Tensor:
    """Products of sorted tokens with the sums of matrices and biases from the root to their nodes, [T, P].

    levels, rows: from the root to the last merged level; rows of -1 are nodes of zeros.
    """
    out_TP, sizes = x_TQ.new_empty(len(x_TQ), bias_SP.shape[1]), levels[-1].sizes
    bias_GP = bias_SP.index_select(0, rows[0])
    for level, rows_G in zip(levels[1:], rows[1:], strict=True):
        node_GP = torch.where(rows_G[:, None] >= 0, bias_SP.index_select(0, rows_G.clamp(min=0)), 0.0)
        bias_GP = node_GP.add_(bias_GP.index_select(0, level.parent_G))
    sums = path_sums(levels, rows, weight_SPQ)
    for weight_PQ, bias_P, out, x in zip(sums, bias_GP.unbind(), out_TP.split(sizes), x_TQ.split(sizes), strict=True):
        torch.addmm(bias_P, x, weight_PQ.t(), out=out)
    return out_TP


def merged_product_backward(grad_TP: Tensor, levels: Sequence[Level], rows: Sequence[Tensor], weight_SPQ: Tensor) -> Tensor:
    """Gradient of `merged_product` with respect to x, [T, Q]."""
    out_TQ, sizes = grad_TP.new_empty(len(grad_TP), weight_SPQ.shape[2]), levels[-1].sizes
    parts = zip(path_sums(levels, rows, weight_SPQ), out_TQ.split(sizes), grad_TP.split(sizes), strict=True)
    for weight_PQ, out, grad in parts:
        torch.mm(grad, weight_PQ, out=out)
    return out_TQ


def path_sums(levels: Sequence[Level], rows: Sequence[Tensor], tensor_S: Tensor) -> Iterator[Tensor]:
    """For each node of the last level, in order, the sum of the rows from the root to it; the next one overwrites it."""
    nodes = [pick(tensor_S, rows_G) for rows_G in rows]
    root = nodes[0][0]
    assert root is not None
    sums = [root, *(root.new_empty(root.shape) for _ in rows[1:])]
    buffers = list(sums)
    for first, chain in _chains(levels):
        for number in range(first, len(levels)):
            node = nodes[number][chain[number]]
            above = sums[number - 1]
            sums[number] = above if node is None else torch.add(above, node, out=buffers[number])
        yield sums[-1]


def weight_gradient(x_TQ: Tensor, grad_TP: Tensor, levels: Sequence[Level], out_SPQ: Tensor) -> None:
    """Gradients of the matrices of all nodes of these levels, in their order; a parent's is the sum of its children's."""
    x, grad = x_TQ.split(levels[-1].sizes), grad_TP.split(levels[-1].sizes)
    starts = _starts(levels)
    last, parents = len(levels) - 1, [level.parent_G.tolist() for level in levels]
    before: list[int] = []
    for first, chain in [*_chains(levels), (1, [])]:
        for number in range(last, first - 1, -1) if before else ():  # these are complete
            node = before[number]
            parent = parents[number][node]
            is_first = node == 0 or parents[number][node - 1] != parent
            total, part = out_SPQ[starts[number - 1] + parent], out_SPQ[starts[number] + node]
            total.copy_(part) if is_first else total.add_(part)
        if chain:
            torch.mm(grad[chain[-1]].t(), x[chain[-1]], out=out_SPQ[starts[-1] + chain[-1]])
        before = chain


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
    before = [0] + [-1] * (len(levels) - 1)
    for leaf in range(len(levels[-1].nodes_G)):
        chain = [leaf] * len(levels)
        for number in range(len(levels) - 1, 0, -1):
            chain[number - 1] = parents[number][chain[number]]
        first = next((number for number in range(1, len(levels)) if chain[number] != before[number]), len(levels))
        yield first, chain
        before = chain
