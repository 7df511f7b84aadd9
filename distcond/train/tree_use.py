"""Which nodes of the trees training went through, and how large they are: written at each validation, drawn on wandb.

Usage is counted from the loads that the metrics pool anyway, so that it costs no pass and no collective of its own.

Legend: G leaves, M trees that are drawn, N nodes, S = M x 2**D prefixes of the deepest level that is drawn, D.
"""

from typing import Any

import torch
from torch import Tensor

from distcond.nn import TreeLinear
from distcond.nn.tree_parts import node_norms
from distcond.ops import first_node
from distcond.train.engine import Engine
from distcond.train.table_files import tree_layers

DEEPEST = 6
"Levels below the roots that are drawn: at most 127 nodes a tree."
MOST_TREES = 4
"Trees of a layer that are drawn."
LEAST_SHARE = 0.002
"Of the tree's tokens, that a node takes to be drawn: two of a thousand units."


class TreeUse:
    """Tokens by the prefix that they took in each tree layer, of all ranks, since they were last taken."""

    def __init__(self) -> None:
        self._tokens: dict[str, Tensor] = {}

    def add(self, name: str, layer: TreeLinear, leaf_G: Tensor, load_G: Tensor) -> None:
        """Count tokens (of all ranks) by leaf, tree << depth | leaf, distinct."""
        deepest, trees = min(layer.depth, DEEPEST), min(layer.num_trees, MOST_TREES)
        is_drawn_G = leaf_G >> layer.depth < trees
        tokens_S = self._tokens.setdefault(name, torch.zeros(trees << deepest, dtype=torch.float64))
        tokens_S.index_add_(0, (leaf_G[is_drawn_G] >> (layer.depth - deepest)).cpu(), load_G[is_drawn_G].double().cpu())

    def take(self, name: str, layer: TreeLinear) -> Tensor:
        """Tokens by prefix of the deepest level that is drawn, float64 [M, 2**D]; counting begins anew."""
        deepest, trees = min(layer.depth, DEEPEST), min(layer.num_trees, MOST_TREES)
        return self._tokens.pop(name, torch.zeros(trees << deepest, dtype=torch.float64)).view(trees, -1)


def nodes_in_use(use: TreeUse, engine: Engine) -> list[dict[str, Any]]:
    """Of each tree layer that saw tokens, as JSON: layer, depth, trees, tokens (of a tree), and nodes, a list for each one.

    A node is [tree, level, prefix, tokens of its level left of it, its tokens, Frobenius norm of its matrix]. Collective: every
    rank looks at the same nodes and knows the norms of those that it holds.
    """
    shown: list[dict[str, Any]] = []
    for name, layer in tree_layers(engine.model).items():
        tokens_MS = use.take(name, layer)
        total = float(tokens_MS[0].sum())
        if not (layer.depth and total):
            continue
        rows, keys = _chosen(layer, tokens_MS, LEAST_SHARE * total)
        norms = _norms(layer, torch.tensor(keys), engine).tolist()
        nodes = [[*row, float(f"{norm:.4g}")] for row, norm in zip(rows, norms, strict=True)]
        shown.append({"layer": name, "depth": layer.depth, "trees": layer.num_trees, "tokens": int(total), "nodes": nodes})
    return shown


def _chosen(layer: TreeLinear, tokens_MS: Tensor, least: float) -> tuple[list[list[int]], list[int]]:
    """Tree, level, prefix, tokens to the left and own tokens of the nodes with at least so many, and their keys."""
    rows, keys = [], []
    for level in range(tokens_MS.shape[1].bit_length()):
        own_MG = tokens_MS.unflatten(1, (2**level, -1)).sum(2)
        left_MG = own_MG.cumsum(1) - own_MG
        for tree, prefix in (own_MG >= least).nonzero().tolist():
            rows.append([tree, level, prefix, int(left_MG[tree, prefix]), int(own_MG[tree, prefix])])
            keys.append(first_node(level, layer.num_trees) + (tree << level) + prefix)
    return rows, keys


def _norms(layer: TreeLinear, keys_N: Tensor, engine: Engine) -> Tensor:
    """Norms of nodes that any rank holds, on the CPU. Collective."""
    if layer.table is None:
        with engine.whole(layer):
            return node_norms(layer, keys_N).cpu()
    expert = engine.tables.expert
    norms_N, owner_N = node_norms(layer, keys_N).cpu(), layer.plan.node_owner(keys_N)
    is_mine_N = (owner_N == expert.rank) | ((owner_N < 0) & (expert.rank == 0))
    return expert.sum_(torch.where(is_mine_N, norms_N, 0.0))
