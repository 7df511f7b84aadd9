"""The one place where a model asks for a matrix that may be a tree."""

from dataclasses import dataclass

from torch import nn

from distcond.nn.tree import TreeLinear


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """Options of the trees of a model; depth 0 is an ordinary `nn.Linear`."""

    depth: int = 0
    full_depth: int | None = None
    rank: int | None = None
    gate: str = "linear"
    gate_gradient: str = "straight_through"
    storage: str = "dense"
    num_trees: int = 1
    min_visits: int = 1
    max_nodes: int | None = None


def make_linear(in_features: int, out_features: int, tree: TreeOptions, *, bias: bool = True) -> nn.Module:
    """A linear layer, or a tree of them."""
    if tree.depth == 0:
        return nn.Linear(in_features, out_features, bias=bias)
    return TreeLinear(
        in_features,
        out_features,
        tree.depth,
        full_depth=tree.full_depth,
        rank=tree.rank,
        gate=tree.gate,
        gate_gradient=tree.gate_gradient,
        storage=tree.storage,
        num_trees=tree.num_trees,
        bias=bias,
        min_visits=tree.min_visits,
        max_nodes=tree.max_nodes,
    )
