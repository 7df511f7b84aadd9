"""What a pass of a tree layer computes: the paths of its tokens, as far down as nodes may come to have weights.

Legend: V leaves of tokens (one for each tree), G leaves or nodes touched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distcond.ops import NodeTensors, TreePath, first_node, tree_path
from distcond.table import NodeTable, Visits, copy_rows, path_node


@dataclass(slots=True)
class Walk:
    """The paths of a pass, and where their nodes are."""

    path: TreePath
    rows: list[Tensor]
    "Stored row of each node, per level; -1 where it does not exist."
    loads: Visits
    "Leaves, tree << depth | leaf, and their tokens."
    asked: Visits
    "Missing nodes right below those that exist, and the tokens that were routed there; none where whole paths are computed."
    removals: int
    "Rows are where they were while the table counts so many removals."

    @classmethod
    def of(cls, leaf_V: Tensor, layout: NodeTable, *, dense: bool) -> "Walk":
        """The paths to these leaves; dense: nodes are parameters, in the order of their ids, and not rows of the table."""
        if not (dense or layout.growth.takes_paths):
            return _walk_to_nodes_that_exist(layout, leaf_V)
        path = tree_path(leaf_V, layout.depth, layout.num_trees)
        levels = [level.nodes_G for level in path.levels]
        loads = Visits(levels[-1] - first_node(layout.depth, layout.num_trees), path.levels[-1].count_G)
        if not dense:
            return cls(path, layout.find(levels), loads, Visits.none(), layout.num_removals)
        first_low = layout.num_full_ids
        rows = [nodes_G - (first_low if number > layout.full_depth else 0) for number, nodes_G in enumerate(levels)]
        return cls(path, rows, loads, Visits.none(), 0)

    @property
    def depth(self) -> int:
        """Levels below the roots."""
        return len(self.path.levels) - 1

    def levels(self) -> list[Tensor]:
        """Nodes of each level."""
        return [level.nodes_G for level in self.path.levels]

    def rows_for_backward(self, table: NodeTable) -> list[Tensor]:
        """Rows as they are now; nodes that may come to exist at the end of the step are made, others are -1."""
        rows = self.rows if self.removals == table.num_removals else table.find(self.levels())
        if table.growth.takes_paths and has_missing(rows):
            rows = table.ensure(self.levels())
        return rows


def has_missing(rows: list[Tensor]) -> bool:
    """Whether any node does not exist; waits for a device once."""
    return bool((torch.cat(rows) < 0).any())


def rows_to_read(table: NodeTable, rows: list[Tensor], device: torch.device) -> tuple[list[Tensor], NodeTensors]:
    """Rows of which none is -1, and the matrices that they are rows of, where the tokens are: missing nodes are zeros."""
    if table.rows_stay:
        return copy_rows(table, rows, device)
    if not has_missing(rows):
        return rows, table.tensors()
    zeros = [table.full.size if number <= table.full_depth else table.low.size for number in range(len(rows))]
    filled = [torch.where(rows_G < 0, zero, rows_G) for rows_G, zero in zip(rows, zeros, strict=True)]
    return filled, table.tensors_with_zeros()


def _walk_to_nodes_that_exist(table: NodeTable, leaf_V: Tensor) -> Walk:
    """Paths cut below the deepest node that exists on any; what is missing above that is one chain of nodes a missing child."""
    depth, trees = table.depth, table.num_trees
    leaf_G, index_V, count_G = torch.unique(leaf_V, return_inverse=True, return_counts=True)
    level_G = table.deepest_level(leaf_G)
    deepest = int(level_G.max()) if len(level_G) else 0
    kept_G = (level_G + 1).clamp(max=deepest)  # of a path that ends sooner, the missing child and its leftmost descendants
    ends_G = leaf_G >> (depth - kept_G) << (deepest - kept_G)
    path = tree_path(ends_G[index_V], deepest, trees)
    is_short_G = level_G < depth
    asked_G = path_node(leaf_G, level_G + 1, depth, trees)[is_short_G]
    asked = Visits.of(asked_G, count_G[is_short_G])
    return Walk(path, table.find([level.nodes_G for level in path.levels]), Visits(leaf_G, count_G), asked, table.num_removals)
