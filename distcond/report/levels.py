"""What each level of a tree layer is: the nodes that exist, their weights, what they add to the output, what its bit decides.

Legend: T tokens, M trees, P outputs of a tree, Q in, K depth, r rank, G nodes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from distcond.data.batch import Batch
from distcond.nn import TreeLinear
from distcond.nn.model import Learner
from distcond.ops import NodeTensors, first_node
from distcond.report.probe import LayerUse, loss_of

MOST_FLIPS = 16
"Levels whose bit is flipped: each costs a pass over FLIP_POSITIONS."
BLOCK_NODES = 4096
"Low-rank nodes whose norms are computed at a time."


@dataclass(frozen=True, slots=True)
class Level:
    """A level of a layer, over all its trees; 0 is that of the roots."""

    level: int
    nodes: int
    "That exist."
    visited: int
    "Of them, in the look at the validation set."
    rare: int
    "Of those visited, with less than a tenth of their fair share of the tokens."
    mean_norm: float
    "Frobenius norm of the matrices that exist."
    output_share: float
    "Of the sum over levels of the root mean square of what each adds to the output."
    ones: float | None
    "Share of tokens whose bit is 1; None: the root has no bit."
    flip_bits: float | None
    "Loss of an element with the bit flipped everywhere less that without, in bits; None: not tried."


def levels_of(learner: Learner, layer: TreeLinear, use: LayerUse, batch: Batch) -> list[Level]:
    """All levels; batch: what flips are tried on."""
    adds = contributions(layer, use.inputs_TQ).square().mean(dim=(1, 2, 3)).sqrt()
    shares = (adds / adds.sum().clamp(min=1e-30)).tolist()
    keys, norms = node_norms(layer)
    plain = loss_of(learner, batch) if layer.depth else 0.0
    return [_level(learner, layer, use, batch, level, shares[level], keys, norms, plain) for level in range(layer.depth + 1)]


def _level(
    learner: Learner,
    layer: TreeLinear,
    use: LayerUse,
    batch: Batch,
    level: int,
    share: float,
    keys: Tensor,
    norms: Tensor,
    plain: float,
) -> Level:
    first, last = first_node(level, layer.num_trees), first_node(level + 1, layer.num_trees)
    here = (keys >= first) & (keys < last)
    prefix, counts = visits(use, layer.depth, level)
    exists = torch.isin(prefix + first, keys[here])
    total = int(use.count_V.sum())
    is_tried = 0 < level <= MOST_FLIPS
    return Level(
        level=level,
        nodes=int(here.sum()),
        visited=int(exists.sum()),
        rare=int((counts[exists] * (last - first) * 10 < total).sum()),
        mean_norm=float(norms[here].mean()) if bool(here.any()) else 0.0,
        output_share=share,
        ones=float(counts[prefix % 2 == 1].sum()) / max(1, total) if level else None,
        flip_bits=_flipped_loss(learner, layer, batch, level) - plain if is_tried else None,
    )


def visits(use: LayerUse, depth: int, level: int) -> tuple[Tensor, Tensor]:
    """Prefixes of a level that tokens went through, tree << level | prefix, ascending int64, and how many."""
    prefix, inverse = torch.unique_consecutive(use.leaf_V >> (depth - level), return_inverse=True)
    return prefix, torch.zeros(len(prefix), dtype=torch.int64).index_add_(0, inverse, use.count_V)


@torch.no_grad()
def contributions(layer: TreeLinear, x_TQ: Tensor) -> Tensor:
    """What each level of its path adds to the output of each token and tree, [K + 1, T, M, P]; their sum is the output."""
    nodes, gates_TMK = _matrices(layer), layer.gates(x_TQ)
    leaf_TM, trees_M = layer.leaf(x_TQ), torch.arange(layer.num_trees)
    parts = []
    for level in range(layer.depth + 1):
        keys_TM = first_node(level, layer.num_trees) + (trees_M << level) + (leaf_TM >> (layer.depth - level))
        y_TMP = _apply(layer, nodes, keys_TM, x_TQ, is_full=level <= layer.full_depth)
        parts.append(y_TMP * gates_TMK[..., level - 1].abs().tanh()[..., None] if level and layer.scales_levels else y_TMP)
    return torch.stack(parts)


@torch.no_grad()
def node_norms(layer: TreeLinear) -> tuple[Tensor, Tensor]:
    """Keys of the nodes that exist, ascending int64 [G], and the Frobenius norms of their matrices."""
    nodes = _matrices(layer)
    full_G = nodes.weight_SPQ.flatten(1).norm(dim=1)
    low = [
        _low_rank_norm(left[:, : layer.rank], right)
        for left, right in zip(nodes.left_SxP.split(BLOCK_NODES), nodes.right_SrQ.split(BLOCK_NODES), strict=True)
    ]
    norms_G = torch.cat([full_G, *low])
    if layer.table is None:
        return torch.arange(len(norms_G)), norms_G
    keys_G, order = torch.sort(torch.cat([store.keys for _, store in layer.table.stores()]))
    return keys_G, norms_G[: len(keys_G)][order]


def _low_rank_norm(left_GrP: Tensor, right_GrQ: Tensor) -> Tensor:
    """Of A B: the trace of (A'A)(BB'), without making the matrices."""
    grams = (left_GrP @ left_GrP.transpose(1, 2)) * (right_GrQ @ right_GrQ.transpose(1, 2))
    return grams.sum(dim=(1, 2)).clamp(min=0).sqrt()


@contextmanager
def flipped(layer: TreeLinear, level: int) -> Iterator[None]:
    """The layer with the bit of a level, 1 to K, flipped for every token of every tree."""
    assert layer.gate is not None

    def flip(module: torch.nn.Module, given: tuple[Tensor, ...], gates_TN: Tensor) -> Tensor:
        sign_K = torch.ones(layer.depth).index_fill_(0, torch.tensor([level - 1]), -1.0)
        return gates_TN * sign_K.repeat(layer.num_trees).to(gates_TN)

    handle = layer.gate.register_forward_hook(flip)
    try:
        yield
    finally:
        handle.remove()


def _flipped_loss(learner: Learner, layer: TreeLinear, batch: Batch, level: int) -> float:
    with flipped(layer, level):
        return loss_of(learner, batch)


def _matrices(layer: TreeLinear) -> NodeTensors:
    return layer.node_tensors(() if layer.table is not None else (layer.weight, layer.bias, layer.right, layer.left))


def _apply(layer: TreeLinear, nodes: NodeTensors, keys_TM: Tensor, x_TQ: Tensor, *, is_full: bool) -> Tensor:
    """Products of each token with the node of each tree, [T, M, P]; zeros where a node does not exist."""
    y_TMP = x_TQ.new_zeros(*keys_TM.shape, layer.out_features // layer.num_trees)
    rows_TM = _rows(layer, keys_TM.flatten(), is_full=is_full).view_as(keys_TM)
    if is_full:
        for row in rows_TM[rows_TM >= 0].unique().tolist():
            token, tree = (rows_TM == row).nonzero(as_tuple=True)
            y_TMP[token, tree] = x_TQ[token] @ nodes.weight_SPQ[row].t() + nodes.bias_SP[row]
        return y_TMP
    token, tree = (rows_TM >= 0).nonzero(as_tuple=True)
    row_N = rows_TM[token, tree]
    left_NxP = nodes.left_SxP[row_N]
    inner_Nr = torch.einsum("nrq,nq->nr", nodes.right_SrQ[row_N], x_TQ[token])
    y_TMP[token, tree] = torch.einsum("nrp,nr->np", left_NxP[:, : layer.rank], inner_Nr) + left_NxP[:, layer.rank :].sum(1)
    return y_TMP


def _rows(layer: TreeLinear, keys_N: Tensor, *, is_full: bool) -> Tensor:
    """Where nodes are stored, int64 [N]; -1: nowhere."""
    if layer.table is None:
        return keys_N if is_full else keys_N - layer.layout.num_full_ids
    return (layer.table.full if is_full else layer.table.low).find(keys_N)
