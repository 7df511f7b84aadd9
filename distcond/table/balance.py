"""Subtrees that move between ranks: what is counted for it, and how their rows travel.

Results do not depend on where a subtree lives, so that all there is to gain is time: the busiest rank of a step is the one
that the others wait for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distcond.table.collective import Collective
from distcond.table.growth import Visits
from distcond.table.node_table import NodeTable
from distcond.table.plan import SubtreePlan


@dataclass(slots=True)
class SubtreeLoads:
    """Tokens of each subtree below the shard level since the map was last made; [2**shard_level], int64."""

    pooled_S: Tensor
    "Of all ranks, as far as they were pooled; the same everywhere."
    own_S: Tensor
    "Of this rank, of applied steps, since then."
    staged_S: Tensor
    "Of this rank, of the current step."
    num_steps: int = 0
    "Applied steps."

    @classmethod
    def none(cls, plan: SubtreePlan) -> "SubtreeLoads":
        """Nothing counted yet."""
        pooled_S, own_S, staged_S = torch.zeros(3, len(plan.owner_S), dtype=torch.int64).unbind()
        return cls(pooled_S, own_S, staged_S)

    def stage(self, loads: Visits, plan: SubtreePlan) -> None:
        """Count the leaves of a backward pass."""
        self.staged_S.index_add_(0, (loads.keys_G >> (plan.depth - plan.shard_level)).cpu(), loads.count_G.cpu())

    def commit(self) -> None:
        """Count the current step, which is applied."""
        self.own_S += self.staged_S
        self.staged_S.zero_()
        self.num_steps += 1

    def forget(self) -> None:
        """Count nothing of the current step, which is not applied."""
        self.staged_S.zero_()

    def pool(self, world: Collective) -> list[int]:
        """Loads over all ranks. A collective call."""
        self.pooled_S += world.sum_(self.own_S)
        self.own_S.zero_()
        return self.pooled_S.tolist()


def move_subtrees(table: NodeTable, new: SubtreePlan, expert: Collective) -> None:
    """Send the rows of subtrees to the ranks that own them by a new plan, with moments and clocks, and visits that are counted.

    Every rank calls this; one all-to-all of rows for each kind, one of visits, and as many of their numbers.
    """
    for _, store in table.stores():
        owner_N = new.node_owner(store.keys)
        moving_G = ((owner_N >= 0) & (owner_N != expert.rank)).nonzero()[:, 0]
        to_G = owner_N[moving_G]
        store.put(_exchange(store.take(moving_G), to_G, expert))
    visits = table.growth.visits
    owner_G = new.node_owner(visits.keys_G)
    moves_G = (owner_G >= 0) & (owner_G != expert.rank)
    came = _exchange(visits.where(moves_G)._asdict(), owner_G[moves_G], expert)
    table.growth.visits = Visits.join([visits.where(~moves_G), Visits(**came)])


def _exchange(columns: dict[str, Tensor], to_G: Tensor, expert: Collective) -> dict[str, Tensor]:
    """Rows of several tensors of any type, each to a rank, as one message of bytes; returns those that came."""
    names = sorted(columns)  # ranks that read a checkpoint may know them in another order
    order_G = torch.argsort(to_G, stable=True)
    send_W, ones = torch.bincount(to_G, minlength=expert.size), [1] * expert.size
    receive_W = expert.all_to_all(send_W, ones, ones)
    whole = [columns[name][order_G] for name in names]
    parts = [column.reshape(len(order_G), column.shape[1:].numel()).view(torch.uint8) for column in whole]
    came_GB = expert.all_to_all(torch.cat(parts, dim=1), send_W.tolist(), receive_W.tolist())
    came = zip(names, whole, came_GB.split([part.shape[1] for part in parts], dim=1), strict=True)
    # NOTE: cloned, for a view might start at an odd address
    return {
        name: part.clone(memory_format=torch.contiguous_format).view(column.dtype).view(len(part), *column.shape[1:])
        for name, column, part in came
    }
