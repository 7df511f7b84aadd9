"""What a pass of a tree layer computes: the paths of its tokens, as far down as nodes may come to have weights.

Legend: V leaves of tokens (one for each tree), G leaves or nodes touched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distcond.ops import Flip, NodeTensors, PerLevel, TreePath, first_node, flipped_nodes, tree_path
from distcond.table import NodeTable, Visits, copy_rows, path_node


@dataclass(slots=True)
class Walk:
    """The paths of a pass, and where their nodes are."""

    path: TreePath
    rows: PerLevel
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
        last_G, count_G = path.last_level()
        loads = Visits(last_G - first_node(layout.depth, layout.num_trees), count_G)
        if not dense:
            return cls(path, layout.find(path.nodes), loads, Visits.none(), layout.num_removals)
        return cls(path, _rows_of_parameters(layout, path.nodes), loads, Visits.none(), 0)

    @property
    def depth(self) -> int:
        """Levels below the roots."""
        return self.path.depth

    def rows_for_backward(self, table: NodeTable) -> PerLevel:
        """Rows as they are now; nodes that may come to exist at the end of the step are made, others are -1."""
        rows = self.rows if self.removals == table.num_removals else table.find(self.path.nodes)
        if table.growth.takes_paths and rows.has_missing:
            rows = table.ensure(self.path.nodes)
        return rows


def flip_of(walk: Walk, level: int, layout: NodeTable, *, dense: bool) -> Flip:
    """What a flip of the bit of a level makes of whole paths."""
    nodes = flipped_nodes(walk.path, level, layout.num_trees)
    rows = _rows_of_parameters(layout, nodes) if dense else layout.find(nodes)
    return Flip.of(level, nodes, rows, walk.path, layout.full_depth)


def _rows_of_parameters(layout: NodeTable, nodes: PerLevel) -> PerLevel:
    full_N, low_N = nodes.split(layout.full_depth + 1)
    return PerLevel(torch.cat([full_N, low_N - layout.num_full_ids]), nodes.bounds)


def rows_to_read(table: NodeTable, rows: PerLevel, device: torch.device) -> tuple[PerLevel, NodeTensors]:
    """Rows of which none is -1, and the matrices that they are rows of, where the tokens are: missing nodes are zeros."""
    if table.rows_stay:
        return copy_rows(table, rows, device)
    if not rows.has_missing:
        return rows, table.tensors()
    kinds = zip(rows.split(table.full_depth + 1), (table.full, table.low), strict=True)
    filled_N = torch.cat([torch.where(rows_N < 0, store.size, rows_N) for rows_N, store in kinds])
    return PerLevel(filled_N, rows.bounds), table.tensors_with_zeros()


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
    return Walk(path, table.find(path.nodes), Visits(leaf_G, count_G), asked, table.num_removals)
