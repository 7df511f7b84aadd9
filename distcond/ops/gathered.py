"""The deep levels of a tree, whose nodes have few tokens each: every token works on a copy of its own low-rank nodes.

Legend: T tokens, C tokens of a chunk, L levels, Q in, P out, r rank, x = r + 1 with a bias, else r; S rows stored.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from distcond.ops.path import NodeTensors, calls_are_cheap

CHUNK_NUMBERS, DEVICE_CHUNK_NUMBERS = 2**18, 2**26
"Numbers copied at a time: 1 MiB, so that they are still in the cache when they are used; where calls are dear, 256 MiB."


def add_gathered(y_TP: Tensor, x_TQ: Tensor, rows_TL: Tensor, nodes: NodeTensors, scale_TL: Tensor | None = None) -> None:
    """Add the products of each token with its nodes, times `scale` (None: 1), in place; nothing where a row is -1."""
    if not len(nodes.right_SrQ):
        return
    for part in _chunks(rows_TL, nodes):
        _, left, hidden_CLx = _hidden(x_TQ[part], rows_TL[part], nodes)
        hidden_CLx = hidden_CLx if scale_TL is None else hidden_CLx * scale_TL[part, :, None]
        y_TP[part, None].baddbmm_(hidden_CLx.flatten(1)[:, None], left)


def gathered_backward(
    grad_x_TQ: Tensor,
    x_TQ: Tensor,
    grad_TP: Tensor,
    rows_TL: Tensor,
    slots_TL: Tensor,
    nodes: NodeTensors,
    out: NodeTensors,
    scale_TL: Tensor | None = None,
) -> Tensor:
    """Add to the gradient of x and of the nodes, rows `slots` of `out`, in place; returns that of the levels, [T, L]."""
    through_TL = x_TQ.new_empty(rows_TL.shape)
    rank = nodes.right_SrQ.shape[1]
    for part in _chunks(rows_TL, nodes):
        x_CQ, grad_CP = x_TQ[part], grad_TP[part]
        right, left, hidden_CLx = _hidden(x_CQ, rows_TL[part], nodes)
        back_CLx = torch.bmm(left, grad_CP[:, :, None]).view_as(hidden_CLx)
        through_TL[part] = (hidden_CLx * back_CLx).sum(2)
        if scale_TL is not None:
            hidden_CLx, back_CLx = hidden_CLx * scale_TL[part, :, None], back_CLx * scale_TL[part, :, None]
        back_CLr = back_CLx[:, :, :rank]
        grad_x_TQ[part, None].baddbmm_(back_CLr.flatten(1)[:, None], right)
        slots = slots_TL[part].flatten()
        out.right_SrQ.index_add_(0, slots, (back_CLr.flatten(1)[:, :, None] * x_CQ[:, None]).view(len(slots), rank, -1))
        left_grad = hidden_CLx.flatten(1)[:, :, None] * grad_CP[:, None]
        out.left_SxP.index_add_(0, slots, left_grad.view(len(slots), hidden_CLx.shape[2], -1))
    return through_TL


def _chunks(rows_TL: Tensor, nodes: NodeTensors) -> Iterator[slice]:
    most = CHUNK_NUMBERS if calls_are_cheap(rows_TL) else DEVICE_CHUNK_NUMBERS
    size = max(1, most // (rows_TL.shape[1] * nodes.low_numbers))
    return (slice(low, low + size) for low in range(0, len(rows_TL), size))


def _hidden(x_CQ: Tensor, rows_CL: Tensor, nodes: NodeTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of the right factors, [C, L * r, Q], and left factors, [C, L * x, P]; hidden units, [C, L, x]."""
    tokens, levels = rows_CL.shape
    rows, rank, width = rows_CL.flatten().clamp(min=0), nodes.right_SrQ.shape[1], nodes.left_SxP.shape[1]
    right = nodes.right_SrQ.index_select(0, rows).view(tokens, levels * rank, -1)
    left = nodes.left_SxP.index_select(0, rows).view(tokens, levels * width, -1)
    hidden_CLx = x_CQ.new_ones(tokens, levels, width)
    hidden_CLx[:, :, :rank] = torch.bmm(right, x_CQ[:, :, None]).view(tokens, levels, rank)
    hidden_CLx *= (rows_CL >= 0)[:, :, None]
    return right, left, hidden_CLx
