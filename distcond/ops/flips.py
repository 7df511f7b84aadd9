"""The leaves that tokens would reach with one bit flipped and the bits below it as they are.

Of each level at or below the flipped one, the nodes are only exchanged: tokens that share a node share the other one too, so the
order of the tokens and the runs that nodes own stay.

Legend: G nodes touched on the last full level, N nodes touched on all levels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distcond.ops.path import TreePath, first_node
from distcond.ops.per_level import PerLevel


class Flip(NamedTuple):
    """One bit of all tokens, flipped."""

    level: int
    "Whose bit; 1 is the coarsest."
    rows: PerLevel
    "Stored row of what each node becomes, int64 [N]; -1 where that does not exist."
    twin_G: Tensor
    "Place of what each node of the last full level becomes among them, int64; -1 where no token reaches it."

    @classmethod
    def of(cls, level: int, flipped: PerLevel, rows: PerLevel, path: TreePath, full_depth: int) -> "Flip":
        """flipped, rows: `flipped_nodes`, and where they are stored."""
        nodes_G, flipped_G = (nodes[full_depth].contiguous() for nodes in (path.nodes, flipped))
        place_G = torch.searchsorted(nodes_G, flipped_G).clamp(max=len(nodes_G) - 1)
        return cls(level, rows, torch.where(nodes_G[place_G] == flipped_G, place_G, -1))


def flipped_nodes(path: TreePath, level: int, num_trees: int = 1) -> PerLevel:
    """Ids of what the nodes of the path become; those above the level stay."""
    parts = [path.nodes.split(level)[0]]
    for number in range(level, len(path.nodes)):
        first = first_node(number, num_trees)
        parts.append(((path.nodes[number] - first) ^ (1 << (number - level))) + first)
    return PerLevel(torch.cat(parts), path.nodes.bounds)
