"""How a table grows: which of the nodes that tokens asked for come to exist at the end of a step.

min_visits = 1: a node exists from the step on in which its first token came, with the gradient of that step. Above 1, the
tree grows by one level at a time: what is counted are visits to missing children of nodes that exist, and a node that is
admitted takes its first gradient at its next visit. Either way no node exists without its parent, and the same nodes
exist on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distcond.table.collective import Collective
from distcond.table.plan import SubtreePlan


class Visits(NamedTuple):
    """Tokens by what they were routed to: missing nodes, where growth is counted; leaves, where loads are."""

    keys_G: Tensor
    "int64, node ids or leaves, ascending and distinct."
    count_G: Tensor
    "int64, tokens."

    @classmethod
    def of(cls, keys_N: Tensor, count_N: Tensor) -> "Visits":
        """Counts added up by key."""
        keys_G, index_N = torch.unique(keys_N, return_inverse=True)
        return cls(keys_G, torch.zeros_like(keys_G).index_add_(0, index_N, count_N))

    @classmethod
    def none(cls, device: torch.device | None = None) -> "Visits":
        """No visits."""
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(empty, empty)

    @classmethod
    def join(cls, parts: Sequence["Visits"]) -> "Visits":
        """The sum of several."""
        return cls.of(torch.cat([part.keys_G for part in parts]), torch.cat([part.count_G for part in parts]))

    @classmethod
    def any_of(cls, parts: Sequence["Visits"]) -> "Visits":
        """Those that any of several knows, which agree where they know the same."""
        if not parts:
            return cls.none()
        keys_G, index_N = torch.unique(torch.cat([part.keys_G for part in parts]), return_inverse=True)
        count_N = torch.cat([part.count_G for part in parts])
        return cls(keys_G, torch.zeros_like(keys_G).scatter_reduce_(0, index_N, count_N, "amax"))

    def to(self, device: torch.device) -> "Visits":
        """On a device."""
        return Visits(self.keys_G.to(device), self.count_G.to(device))

    def where(self, mask_G: Tensor) -> "Visits":
        """Those where the mask is true."""
        return Visits(self.keys_G[mask_G], self.count_G[mask_G])

    def first(self, number: int) -> "Visits":
        """The first ones by (count descending, key ascending), in that order."""
        order = torch.sort(self.count_G, descending=True, stable=True).indices[:number]
        return Visits(self.keys_G[order], self.count_G[order])


@dataclass
class Growth:
    """Limits of one table's growth, and what is counted for it.

    Counts are kept for missing children of existing nodes alone, two numbers each: never more of them than nodes exist, and one.
    """

    min_visits: int = 1
    max_nodes: int | None = None
    num_nodes: int = 0
    "Nodes of the table over all ranks, replicated ones counted once; kept up to date where growth is limited."
    visits: Visits = field(default_factory=Visits.none)
    "Of past steps; on a sharded table, to nodes that this rank would hold."
    capped: int = 0
    "Tokens since `take_capped` whose path ended above its leaf, with the table full."
    _staged: list[Visits] = field(default_factory=list)

    @property
    def is_limited(self) -> bool:
        """Whether tokens may ask in vain."""
        return self.min_visits > 1 or self.max_nodes is not None

    @property
    def is_full(self) -> bool:
        """Whether the table has reached max_nodes."""
        return self.max_nodes is not None and self.num_nodes >= self.max_nodes

    @property
    def takes_paths(self) -> bool:
        """Whether whole paths are computed, for all their nodes may come to exist at the end of the step."""
        return self.min_visits == 1 and not self.is_full

    def stage(self, visits: Visits) -> None:
        """Count visits of a backward pass, for the end of its step."""
        visits = visits.to(self.visits.keys_G.device)
        if self.is_full:
            self.capped += int(visits.count_G.sum())
        elif self.is_limited:
            self._staged.append(visits)

    def take_staged(self) -> Visits:
        """Visits of the current step; forgets them."""
        staged, self._staged = self._staged, []
        return Visits.join(staged) if staged else Visits.none(self.visits.keys_G.device)

    def take_capped(self) -> int:
        """Tokens of this rank that a full table kept from their leaf, since the last call."""
        capped, self.capped = self.capped, 0
        return capped

    def commit(self, admission: "Admission") -> None:
        """Take over what an applied step decided; a full table counts no more."""
        self.num_nodes = admission.num_nodes
        self.visits = Visits.none(self.visits.keys_G.device) if self.is_full else admission.visits

    def to(self, device: torch.device) -> None:
        """Move to a device, in place."""
        self.visits = self.visits.to(device)
        self._staged = [staged.to(device) for staged in self._staged]


@dataclass(slots=True)
class Admission:
    """What the end of a step is to bring, once it is known that the step is applied."""

    keys_G: Tensor
    "int64, ascending: the new nodes that this rank holds."
    visits: Visits
    "What goes on being counted."
    num_nodes: int


def admit(
    tables: Sequence[tuple[Growth, SubtreePlan]], world: Collective, expert: Collective, replica: Collective
) -> list[Admission | None]:
    """Choose the new nodes of each table from the visits of this step and those before; None where all may come.

    Candidates with min_visits are taken by (visits descending, node id ascending) until there are max_nodes. The same is
    decided on every rank. A collective call where a table is limited and not full: a few small messages for all tables.
    """
    growing = [(growth, plan) for growth, plan in tables if growth.is_limited and not growth.is_full]
    if not growing:
        return [None] * len(tables)
    counted = _pool(growing, world, replica)
    due = [visits.where(visits.count_G >= growth.min_visits) for visits, (growth, _) in zip(counted, growing, strict=True)]
    own = [visits.where(plan.node_owner(visits.keys_G) >= 0) for visits, (_, plan) in zip(due, growing, strict=True)]
    own_totals = expert.sum_(torch.tensor([len(visits.keys_G) for visits in own])).tolist()
    totals = [total + len(all_.keys_G) - len(mine.keys_G) for total, all_, mine in zip(own_totals, due, own, strict=True)]
    admitted = _cut([growth for growth, _ in growing], due, own, totals, expert)
    admissions = iter(
        Admission(chosen.keys_G, visits.where(~torch.isin(visits.keys_G, chosen.keys_G)), growth.num_nodes + total)
        for (growth, _), visits, chosen, total in zip(growing, counted, admitted, totals, strict=True)
    )
    return [next(admissions) if growth.is_limited and not growth.is_full else None for growth, _ in tables]


def _pool(growing: Sequence[tuple[Growth, SubtreePlan]], world: Collective, replica: Collective) -> list[Visits]:
    """Visits of past steps and of this one on all ranks: of replicated nodes, and of those that this rank would hold."""
    staged = [growth.take_staged() for growth, _ in growing]
    is_own = [plan.node_owner(visits.keys_G) >= 0 for visits, (_, plan) in zip(staged, growing, strict=True)]
    shared = _sum_over(world, [visits.where(~mask_G) for visits, mask_G in zip(staged, is_own, strict=True)])
    own = _sum_over(replica, [visits.where(mask_G) for visits, mask_G in zip(staged, is_own, strict=True)])
    return [Visits.join([growth.visits, *parts]) for (growth, _), *parts in zip(growing, shared, own, strict=True)]


def _sum_over(group: Collective, visits: list[Visits]) -> list[Visits]:
    """Visits on all ranks of a group together, for each of several tables."""
    if group.size == 1:
        return visits
    ranks = group.gather_runs([run for part in visits for run in part])
    return [Visits.join([Visits(*runs[at : at + 2]) for runs in ranks]) for at in range(0, 2 * len(visits), 2)]


def _cut(growths: list[Growth], due: list[Visits], own: list[Visits], totals: list[int], expert: Collective) -> list[Visits]:
    """Those due that have room; `totals` is lowered to the number over all ranks."""
    rooms = [total if g.max_nodes is None else g.max_nodes - g.num_nodes for g, total in zip(growths, totals, strict=True)]
    crowded = [at for at, (total, room) in enumerate(zip(totals, rooms, strict=True)) if total > room]
    admitted = list(due)
    if not crowded:
        return admitted
    ranks = expert.gather_runs([run for at in crowded for run in own[at]])
    for place, at in enumerate(crowded):
        shared = due[at].where(~torch.isin(due[at].keys_G, own[at].keys_G))
        everywhere = Visits.join([shared, *(Visits(*runs[2 * place : 2 * place + 2]) for runs in ranks)])
        admitted[at] = due[at].where(torch.isin(due[at].keys_G, everywhere.first(rooms[at]).keys_G))
        totals[at] = rooms[at]
    return admitted
