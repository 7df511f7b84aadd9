"""Which rank holds which node: levels above `shard_level` are on every rank, each subtree below lives on one."""

from dataclasses import dataclass

import torch
from torch import Tensor

SUBTREES_PER_RANK = 4
"Least number of subtrees per rank, so that load can be balanced by remapping subtrees."


def node_level(nodes_G: Tensor, num_trees: int = 1) -> Tensor:
    """Level of each node id (`first_node`), int64; exact for all of 62 levels, where float logarithms are not."""
    highest = 63 - (num_trees - 1).bit_length()
    bounds = num_trees * (2 ** torch.arange(1, highest, device=nodes_G.device) - 1)
    return torch.bucketize(nodes_G, bounds, right=True)


@dataclass(frozen=True, slots=True)
class SubtreePlan:
    """Placement of trees of `depth` levels over `num_ranks` ranks; results do not depend on it.

    Trees that have fewer leaves than ranks are wholly replicated, and tokens stay where they are (`is_sharded` false).
    """

    depth: int
    num_ranks: int
    shard_level: int
    owner_S: tuple[int, ...]
    "Rank of each of the 2**shard_level subtrees, tree by tree."
    num_trees: int = 1

    @classmethod
    def make(cls, depth: int, num_ranks: int, shard_level: int | None = None, num_trees: int = 1) -> "SubtreePlan":
        """Subtrees dealt round robin, at least SUBTREES_PER_RANK a rank where the depth allows."""
        if shard_level is None:
            shard_level = (-(-SUBTREES_PER_RANK * num_ranks // num_trees) - 1).bit_length()
        level = min(shard_level, depth)
        owner_S = tuple(subtree % num_ranks for subtree in range(num_trees * 2**level))
        return cls(depth, num_ranks, level, owner_S, num_trees)

    @property
    def is_sharded(self) -> bool:
        """Whether tokens travel to the owners of their subtrees."""
        return self.num_ranks > 1 and len(self.owner_S) >= self.num_ranks

    def owner(self, leaf_T: Tensor) -> Tensor:
        """Rank that holds the subtree of each leaf (tree << depth | leaf), int64."""
        owners = torch.tensor(self.owner_S, device=leaf_T.device)
        subtree_T = leaf_T >> (self.depth - self.shard_level)
        return owners[subtree_T]

    def node_owner(self, nodes_G: Tensor) -> Tensor:
        """Rank that holds each node, int64; -1: every rank does."""
        if not self.is_sharded:
            return torch.full_like(nodes_G, -1)
        level_G = node_level(nodes_G, self.num_trees)
        prefix_G = nodes_G + self.num_trees - (torch.full_like(nodes_G, self.num_trees) << level_G)
        subtree_G = prefix_G >> (level_G - self.shard_level).clamp(min=0)
        owners = torch.tensor(self.owner_S, device=nodes_G.device)
        own_G = owners[subtree_G.clamp(max=len(self.owner_S) - 1)]
        return torch.where(level_G < self.shard_level, -1, own_G)
