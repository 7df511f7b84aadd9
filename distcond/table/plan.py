"""Which rank holds which node: levels above `shard_level` are on every rank, each subtree below lives on one."""

from dataclasses import dataclass

import torch
from torch import Tensor

SUBTREES_PER_RANK = 4
"Least number of subtrees per rank, so that load can be balanced by remapping subtrees."


def node_level(nodes_G: Tensor) -> Tensor:
    """Level of each node id (heap order), int64; exact for all of 62 levels, where float logarithms are not."""
    bounds = 2 ** torch.arange(1, 63, device=nodes_G.device) - 1
    return torch.bucketize(nodes_G, bounds, right=True)


@dataclass(frozen=True, slots=True)
class SubtreePlan:
    """Placement of a tree of `depth` levels over `num_ranks` ranks; results do not depend on it.

    A tree with fewer leaves than ranks is wholly replicated, and tokens stay where they are (`is_sharded` false).
    """

    depth: int
    num_ranks: int
    shard_level: int
    owner_S: tuple[int, ...]
    "Rank of each of the 2**shard_level subtrees."

    @classmethod
    def make(cls, depth: int, num_ranks: int, shard_level: int | None = None) -> "SubtreePlan":
        """Subtrees dealt round robin, at least SUBTREES_PER_RANK a rank where the depth allows."""
        if shard_level is None:
            shard_level = (SUBTREES_PER_RANK * num_ranks - 1).bit_length()
        level = min(shard_level, depth)
        return cls(depth, num_ranks, level, tuple(subtree % num_ranks for subtree in range(2**level)))

    @property
    def is_sharded(self) -> bool:
        """Whether tokens travel to the owners of their subtrees."""
        return self.num_ranks > 1 and 2**self.shard_level >= self.num_ranks

    def owner(self, leaf_T: Tensor) -> Tensor:
        """Rank that holds the subtree of each leaf, int64."""
        owners = torch.tensor(self.owner_S, device=leaf_T.device)
        subtree_T = leaf_T >> (self.depth - self.shard_level)
        return owners[subtree_T]

    def node_owner(self, nodes_G: Tensor) -> Tensor:
        """Rank that holds each node, int64; -1: every rank does."""
        if not self.is_sharded:
            return torch.full_like(nodes_G, -1)
        level_G = node_level(nodes_G)
        prefix_G = nodes_G + 1 - (torch.ones_like(nodes_G) << level_G)
        subtree_G = prefix_G >> (level_G - self.shard_level).clamp(min=0)
        owners = torch.tensor(self.owner_S, device=nodes_G.device)
        own_G = owners[subtree_G.clamp(max=len(self.owner_S) - 1)]
        return torch.where(level_G < self.shard_level, -1, own_G)
