"""What each level of a tree layer is: the nodes that exist, their weights, what they add to the output, what its bit decides.

Legend: T tokens, M trees, L levels, P outputs of a tree, Q in, K depth, G nodes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from distcond.data.batch import Batch
from distcond.nn import TreeLinear
from distcond.nn.model import Learner
from distcond.nn.tree_parts import contributions, node_keys, node_norms
from distcond.ops import first_node
from distcond.report.probe import LayerUse, loss_of

MOST_FLIPS = 16
"Levels whose bit is flipped: each costs a pass over FLIP_POSITIONS."


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
    matrix_TMLP, bias_TMLP = contributions(layer, use.inputs_TQ)
    adds = (matrix_TMLP + bias_TMLP).square().mean(dim=(0, 1, 3)).sqrt()
    shares = (adds / adds.sum().clamp(min=1e-30)).tolist()
    keys = node_keys(layer)
    norms = node_norms(layer, keys)
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
