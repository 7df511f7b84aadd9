"""The map of a tree layer: which nodes tokens went through and how much weight they hold, as an icicle of any depth; its ranks.

Legend: M trees, K depth, G nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from safetensors import safe_open
from torch import Tensor

from distcond.nn import TreeLinear
from distcond.nn.tree_parts import node_keys, node_norms
from distcond.ops import first_node
from distcond.report.levels import Level, visits
from distcond.report.probe import LayerUse
from distcond.report.svg import shade, tag
from distcond.report.words import percent, show
from distcond.table import SubtreePlan
from distcond.train.table_files import ANY_FILE

ICICLE_WIDTH, ROW, LOW_ROW = 1000.0, 26, 12
"Units; a row is lower where there are more than 16."
LEAST_WIDTH = 2.0
"Units that a node takes to be drawn by itself: a pixel and a half on a wide screen; narrower neighbours are drawn as one."
MOST_BOXES = 1600
"Of a tree; with more, the least width grows."
MOST_TREES = 4
"Trees of a layer that are drawn."
MOST_ROWS = 200
"Nodes in the table below the map, the busiest first."


@dataclass(frozen=True, slots=True)
class Node:
    """A node, or several neighbours of a level."""

    level: int
    left: float
    width: float
    "Share of the tree's tokens."
    key: int
    "Of the first."
    number: int
    tokens: int
    norm: float
    "Frobenius; the mean of several."


@dataclass(frozen=True, slots=True)
class _Visited:
    """Nodes of a level of a tree, from the left: where each begins and ends, shares of the tree's tokens, and what it is."""

    level: int
    left: np.ndarray
    right: np.ndarray
    key: np.ndarray
    tokens: np.ndarray
    norm: np.ndarray


@dataclass(frozen=True, slots=True)
class TreeMap:
    """What the page shows of a layer."""

    name: str
    layer: TreeLinear
    levels: Sequence[Level]
    icicles: list[Markup]
    nodes: list[Node]
    "The busiest ones."
    merged: int
    "Visited nodes that were too narrow to be drawn by themselves."
    tokens: int
    path_numbers: int
    "Weights on the paths of a token."
    numbers: int
    "Weights of all nodes that exist."
    ranks: list[dict[str, float]]
    "Of each rank: tokens, nodes, subtrees; empty: every rank holds the whole tree."
    leaf_loads: list[float]
    "Share of each leaf in the tokens of its tree, the most first."
    by_updates: list[int]
    "Nodes by the share of training steps that touched them: below 1%, 10%, 50%, up to 100%; empty: not known."


def tree_map(name: str, layer: TreeLinear, use: LayerUse, levels: Sequence[Level], checkpoint: Path, step: int) -> TreeMap:
    """The map of a layer from what reached it; checkpoint, step: for ranks and clocks."""
    keys = node_keys(layer)
    norms = node_norms(layer, keys)
    found = [_visited(layer, use, tree, keys, norms) for tree in range(layer.num_trees)]
    drawn = [_boxes(levels_of_tree) for levels_of_tree in found[:MOST_TREES]]
    most = [max((float(tree[level].norm.max(initial=0.0)) for tree in found), default=0.0) for level in range(layer.depth + 1)]
    total = int(use.count_V.sum())
    return TreeMap(
        name=name,
        layer=layer,
        levels=levels,
        icicles=[_icicle(layer, nodes, most, tree) for tree, nodes in enumerate(drawn)],
        nodes=_busiest([level for tree in found for level in tree]),
        merged=sum(node.number for nodes in drawn for node in nodes if node.number > 1),
        tokens=total // layer.num_trees,
        path_numbers=layer.num_trees * _numbers(layer, layer.full_depth + 1, layer.depth - layer.full_depth),
        numbers=_numbers(layer, num_full := int((keys < layer.layout.num_full_ids).sum()), len(keys) - num_full),
        ranks=_ranks(name, layer, use, checkpoint),
        leaf_loads=(use.count_V.sort(descending=True).values * (layer.num_trees / total)).tolist(),
        by_updates=_by_updates(layer, step),
    )


def _visited(layer: TreeLinear, use: LayerUse, tree: int, keys: Tensor, norms: Tensor) -> list[_Visited]:
    """The nodes of a tree that exist and that tokens went through, by level."""
    of_tree = use.leaf_V >> layer.depth == tree
    own = LayerUse(use.leaf_V[of_tree], use.count_V[of_tree], use.inputs_TQ, None)
    total, levels = max(1, int(own.count_V.sum())), []
    for level in range(layer.depth + 1):
        prefix_G, count_G = visits(own, layer.depth, level)
        end_G = count_G.cumsum(0)
        key_G = prefix_G + first_node(level, layer.num_trees)
        place_G = torch.searchsorted(keys, key_G).clamp(max=len(keys) - 1)
        exists_G = keys[place_G] == key_G
        columns = ((end_G - count_G).double() / total, end_G.double() / total, key_G, count_G, norms[place_G].double())
        levels.append(_Visited(level, *(column[exists_G].numpy() for column in columns)))
    return levels


def _boxes(levels: list[_Visited]) -> list[Node]:
    """Nodes as they are drawn: narrow neighbours as one, so that at most MOST_BOXES are left."""
    least = LEAST_WIDTH / ICICLE_WIDTH
    while True:
        starts = [_starts(level, least) for level in levels]
        if sum(map(len, starts)) <= MOST_BOXES:  # at the latest with least 1, where a level is one box
            return [box for level, start in zip(levels, starts, strict=True) for box in _merged(level, start)]
        least *= 1.5


def _starts(level: _Visited, least: float) -> np.ndarray:
    """Places of the nodes that a box begins with: those that are wide, or follow a wide one or a wide gap."""
    narrow = level.right - level.left < least
    begins = np.ones(len(narrow), bool)
    begins[1:] = ~(narrow[1:] & narrow[:-1] & (level.left[1:] - level.right[:-1] < least))
    return np.flatnonzero(begins)


def _merged(level: _Visited, start: np.ndarray) -> list[Node]:
    if not len(start):
        return []
    number = np.diff(start, append=len(level.key))
    right = level.right[start + number - 1]
    tokens, norm = np.add.reduceat(level.tokens, start), np.add.reduceat(level.norm, start) / number
    columns = (level.left[start], right - level.left[start], level.key[start], number, tokens, norm)
    return [Node(level.level, *row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _busiest(levels: list[_Visited]) -> list[Node]:
    """The MOST_ROWS nodes with the most tokens."""
    every = []
    for level in levels:
        place = np.argsort(-level.tokens, kind="stable")[:MOST_ROWS]
        columns = (
            level.left[place],
            (level.right - level.left)[place],
            level.key[place],
            np.ones_like(place),
            level.tokens[place],
        )
        rows = zip(*(column.tolist() for column in (*columns, level.norm[place])), strict=True)
        every += [Node(level.level, *row) for row in rows]
    return sorted(every, key=lambda node: (-node.tokens, node.key))[:MOST_ROWS]


def _icicle(layer: TreeLinear, nodes: list[Node], most: Sequence[float], tree: int) -> Markup:
    """Levels from the top; width is usage, shade and height of the inner bar the weight norm, beside the most of its level."""
    row = ROW if layer.depth <= 16 else LOW_ROW
    parts = []
    for node in nodes:
        x, y, width = ICICLE_WIDTH * node.left, node.level * row, max(ICICLE_WIDTH * node.width - 0.6, 0.4)
        share = node.norm / most[node.level] if most[node.level] > 0 else 0.0
        style = f"s{shade(share, 0, 1)}" if node.level else "root"
        parts.append(tag("rect", class_="box", x=x, y=y, width=width, height=row - 2, data_tip=_tip(layer, node)))
        if height := share * (row - 2):
            parts.append(tag("rect", class_=f"fill {style}", x=x, y=y + row - 2 - height, width=width, height=height))
    name = f"tree {tree}: nodes by level; width is the share of tokens, the filled height the norm of the node's matrix"
    levels = [tag("span", str(level)) for level in range(layer.depth + 1)]
    drawn = tag(
        "svg",
        tag("title", name),
        *parts,
        class_="icicle",
        viewBox=f"0 0 {ICICLE_WIDTH:.0f} {row * (layer.depth + 1)}",
        height=row * (layer.depth + 1),
        preserveAspectRatio="none",
        role="img",
        aria_label=name,
        tabindex="0",
        data_marks="direct",
    )
    labels = tag("div", *levels, class_="levels" if row == ROW else "levels low", aria_hidden="true")
    return tag("div", labels, drawn, class_="rows")


def path_of(layer: TreeLinear, node: Node) -> str:
    """The bits that lead to a node, coarsest first; of a forest the tree before them."""
    inside = node.key - first_node(node.level, layer.num_trees)
    bits = f"{inside & ((1 << node.level) - 1):0{node.level}b}" if node.level else "root"
    return f"{inside >> node.level}: {bits}" if layer.num_trees > 1 else bits


def _tip(layer: TreeLinear, node: Node) -> str:
    head = f"{node.number:,} nodes from {path_of(layer, node)} on" if node.number > 1 else f"node {path_of(layer, node)}"
    norm = "mean weight norm" if node.number > 1 else "weight norm"
    about = " with gaps" if node.number > 1 else ""
    return f"{head}\nlevel {node.level}\n{node.tokens:,} tokens, {percent(node.width)}{about}\n{norm} {show(node.norm)}"


def _ranks(name: str, layer: TreeLinear, use: LayerUse, checkpoint: Path) -> list[dict[str, float]]:
    """What each rank of the run served of these tokens, and holds, by the subtree map of the checkpoint."""
    files = sorted(checkpoint.glob(ANY_FILE))
    if layer.table is None or len(files) < 2:
        return []
    with safe_open(files[0], "pt") as file:
        level, owners = int(file.get_tensor(f"{name}/shard_level")), file.get_tensor(f"{name}/owner")
    plan = SubtreePlan.make(layer.depth, len(files), level, layer.num_trees)
    plan = replace(plan, owner_S=tuple(owners.tolist()))
    if not plan.is_sharded:
        return []
    tokens = torch.zeros(len(files), dtype=torch.int64).index_add_(0, plan.owner(use.leaf_V), use.count_V)
    owner_G = plan.node_owner(torch.cat([store.keys for _, store in layer.table.stores()]))
    return [
        {
            "tokens": int(tokens[rank]),
            "nodes": int(((owner_G == rank) | (owner_G < 0)).sum()),
            "subtrees": plan.owner_S.count(rank),
        }
        for rank in range(len(files))
    ]


def _numbers(layer: TreeLinear, full: int, low: int) -> int:
    """Weights and biases of so many full and low-rank nodes."""
    return full * layer.layout.full.width + low * layer.layout.low.width


def _by_updates(layer: TreeLinear, step: int) -> list[int]:
    if layer.table is None or step < 1:
        return []
    clocks = [store.state["clock"] for _, store in layer.table.stores() if "clock" in store.state]
    if not clocks:
        return []
    share = torch.cat(clocks).double() / step
    bounds = torch.tensor([0.01, 0.1, 0.5], dtype=torch.float64)
    return torch.bincount(torch.bucketize(share, bounds, right=True), minlength=4).tolist()
