"""Which rank holds which node: levels above `shard_level` are on every rank, each subtree below lives on one."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SUBTREES_PER_RANK = 4
"Least number of subtrees per rank, so that load can be balanced by remapping subtrees."
ACCEPTED = 1.05
"Load of the busiest rank, over that of a map made anew, up to which fewer moves are preferred."


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

    def rebalanced(self, load_S: Sequence[int]) -> "SubtreePlan":
        """The same subtrees on ranks that are loaded more evenly, given the load of each; a pure function of both.

        Single subtrees move from the busiest rank to the idlest as long as that helps; where a map made anew is better by more
        than ACCEPTED, it is that one: the longest first, each to the idlest rank (Graham 1969, within 4/3 of the best).
        """
        if not self.is_sharded:
            return self
        moved, dealt = _move_single(load_S, self.owner_S, self.num_ranks), _deal_longest_first(load_S, self.num_ranks)
        most_moved, most_dealt = (max(self.rank_loads(load_S, owners)) for owners in (moved, dealt))
        return replace(self, owner_S=tuple(moved if most_moved <= ACCEPTED * most_dealt else dealt))

    def rank_loads(self, load_S: Sequence[int], owner_S: Sequence[int] | None = None) -> list[int]:
        """Load of each rank; owner_S: under another map."""
        loads = [0] * self.num_ranks
        for owner, load in zip(owner_S or self.owner_S, load_S, strict=True):
            loads[owner] += load
        return loads

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


def _move_single(load_S: Sequence[int], owner_S: Sequence[int], num_ranks: int) -> list[int]:
    """Owners after moves of one subtree each, from the busiest rank to the idlest, that lower the load of both."""
    owners, held, loads = list(owner_S), [set[int]() for _ in range(num_ranks)], [0] * num_ranks
    for subtree, owner in enumerate(owners):
        held[owner].add(subtree)
        loads[owner] += load_S[subtree]
    while True:
        busiest, idlest = max(range(num_ranks), key=loads.__getitem__), min(range(num_ranks), key=loads.__getitem__)
        gap = loads[busiest] - loads[idlest]
        helpful = [subtree for subtree in held[busiest] if 0 < load_S[subtree] < gap]
        if not helpful:
            return owners
        best = min(helpful, key=lambda subtree: (abs(gap - 2 * load_S[subtree]), subtree))
        held[busiest].remove(best)
        held[idlest].add(best)
        loads[busiest] -= load_S[best]
        loads[idlest] += load_S[best]
        owners[best] = idlest


def _deal_longest_first(load_S: Sequence[int], num_ranks: int) -> list[int]:
    """Owners where subtrees go to the idlest rank, the most loaded first; equal ones by number."""
    owners, ranks = [0] * len(load_S), [(0, 0, rank) for rank in range(num_ranks)]
    for subtree in sorted(range(len(load_S)), key=lambda subtree: (-load_S[subtree], subtree)):
        load, count, rank = heapq.heappop(ranks)
        owners[subtree] = rank
        heapq.heappush(ranks, (load + load_S[subtree], count + 1, rank))
    return owners
