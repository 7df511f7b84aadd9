"""Rows of node tables spread over ranks: their gradient as the mean over ranks, its norm, and their update.

Rows of replicated nodes (above the plan's shard level) are summed over all ranks, rows of sharded nodes over the ranks
that hold the same part of the tables. Every rank calls every collective equally often, whatever it was routed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distcond.nn.gates import Gate
from distcond.nn.tree import TreeLinear
from distcond.ops import native
from distcond.optim.row_adam import RowAdam, add_state
from distcond.table import Admission, Collective, NodeTable, RowStore, SubtreeLoads, SubtreePlan, admit, move_subtrees

SQUARE_NUMBERS = 2**15
"Numbers whose double precision copy stays in a processor's cache while a norm is summed."


@dataclass(slots=True)
class _Part:
    """Touched rows of one kind in a table, in the order of their keys, and their gradient."""

    table: NodeTable
    kind: str
    store: RowStore
    keys_G: Tensor
    grad_GW: Tensor

    def update(self) -> tuple[RowStore, Tensor, Tensor]:
        """Where the rows are, and their gradient; those that are new on this rank are born."""
        rows_G = self.table.ensure_rows(self.kind, self.keys_G)
        self.store.settle()
        return self.store, rows_G, self.grad_GW

    def keep(self, mask_G: Tensor) -> None:
        """Keep a part of it."""
        if not bool(mask_G.all()):  # else nothing is copied
            self.keys_G, self.grad_GW = self.keys_G[mask_G], self.grad_GW[mask_G]


class ShardedRows:
    """The lazy tables of a model under expert parallelism: who holds what, and one optimiser for it.

    world: all ranks. expert: the ranks that share one copy of the tables. replica: the ranks with the same part.
    rebalance_every: applied steps after which subtrees move to other ranks, so that these serve equally many tokens; None:
        never. Results do not depend on it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: RowAdam,
        *,
        world: Collective,
        expert: Collective,
        replica: Collective,
        shard_level: int | None = None,
        rebalance_every: int | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.world, self.expert, self.replica = world, expert, replica
        self.layers = [layer for layer in optimizer.layers if layer.table is not None]
        self.rebalance_every = rebalance_every
        self._updates: list[_Part] = []
        self._admissions: list[Admission | None] = []
        self._statistics: list[Tensor] = []
        for layer in optimizer.layers:
            layer.records_touched = False  # nodes that are parameters have the dense part's optimiser
            self._take_from_first_rank(layer)
        for table in optimizer.tables():
            table.adopt()
        for layer in self.layers:
            layer.shard(SubtreePlan.make(layer.depth, expert.size, shard_level, layer.num_trees), expert)
            if rebalance_every is not None and layer.plan.is_sharded:
                layer.subtree_loads = SubtreeLoads.none(layer.plan)

    def _take_from_first_rank(self, layer: TreeLinear) -> None:
        """Make buffers and rows those of rank 0, as DeepSpeed does for parameters."""
        for buffer in layer.buffers():
            self.world.broadcast_(buffer)
        if layer.table is None:
            return
        layer.table.seed = int(layer.seed)
        for name, store in layer.table.stores():
            size = torch.tensor([store.size, -store.size])
            most, least = self.world.max_(size).tolist()
            if most != -least:
                raise ValueError(f"ranks hold tables of {-least} to {most} {name} nodes; give every rank the same model")
            keys, rows = self.world.broadcast_(store.keys.clone()), self.world.broadcast_(store.data.clone())
            store.replace(keys, rows)

    @property
    def is_sharded(self) -> bool:
        """Whether a forward pass of any layer is a collective call."""
        return any(layer.plan.is_sharded for layer in self.layers)

    @torch.no_grad()
    def reduce_gradients(self) -> Tensor:
        """Turn what backward collected into mean gradients over ranks; returns their squared norm, float32 scalar.

        Four collectives (three more for replicas), however many layers there are; they also pool the gates' statistics. A
        few more where growth is limited, until the tables are full.
        """
        tables = [(table, layer.plan) for layer in self.layers for table in (layer.table,) if table is not None]
        self._admissions = admit([(table.growth, plan) for table, plan in tables], self.world, self.expert, self.replica)
        shared: list[_Part] = []
        own: list[_Part] = []
        for (table, plan), admission in zip(tables, self._admissions, strict=True):
            for kind, store in table.stores():
                rows_G, grad_GW = store.take_gradient()
                whole = _Part(table, kind, store, store.keys[rows_G], grad_GW)
                if admission is not None:
                    whole.keep((rows_G < store.num_settled) | torch.isin(whole.keys_G, admission.keys_G))
                is_shared_G = plan.node_owner(whole.keys_G) < 0
                for parts, mask_G in ((shared, is_shared_G), (own, ~is_shared_G)):
                    parts.append(replace(whole))
                    parts[-1].keep(mask_G)
        self._sum_over(self.world, shared)
        self._sum_over(self.replica, own)
        self._updates = [*shared, *own]
        if self.world.size > 1:
            for part in self._updates:
                part.grad_GW /= self.world.size
        # Every replica counts its own rows, so that one sum over the world serves the norm and the statistics.
        sums = [_square(own) / self.replica.size, *(gate.take_statistics().cpu() for gate in self._gates())]
        norm, *self._statistics = self.world.sum_(torch.cat(sums)).split([len(part) for part in sums])
        total: Tensor = norm + _square(shared)
        return total[0].float()

    def _sum_over(self, group: Collective, parts: list[_Part]) -> None:
        """Make the gradient of each part its sum over a group, for the union of the keys."""
        if group.size == 1 or not parts:
            return
        keys = group.gather_runs([part.keys_G for part in parts])
        unions = [torch.unique(torch.cat(runs)) for runs in zip(*keys, strict=True)]
        sizes = [len(union_G) * part.store.width for union_G, part in zip(unions, parts, strict=True)]
        total = parts[0].grad_GW.new_zeros(sum(sizes))
        for part, union_G, flat in zip(parts, unions, total.split(sizes), strict=True):
            grad_GW = flat.view(-1, part.store.width)
            grad_GW[torch.searchsorted(union_G, part.keys_G)] = part.grad_GW
            part.keys_G, part.grad_GW = union_G, grad_GW
        group.sum_(total)

    def _gates(self) -> list[Gate]:
        return [layer.gate for layer in self.optimizer.layers if layer.gate is not None]

    @torch.no_grad()
    def step(self, lr: float, scale: float) -> None:
        """Apply the reduced gradient times `scale`; commit new nodes, and the gates' statistics, pooled over all ranks."""
        self.optimizer.lr = lr
        for table, admission in zip(self.optimizer.tables(), self._admissions, strict=True):
            table.settle(admission)
        if scale != 1.0:
            for part in self._updates:
                part.grad_GW.mul_(scale)
        self.optimizer.step_rows([part.update() for part in self._updates])
        for gate, statistics in zip(self._gates(), self._statistics, strict=True):
            gate.commit(statistics)
        self._updates, self._statistics = [], []
        self._rebalance()

    def _rebalance(self) -> None:
        """Count the loads of a step; where enough of them are counted, move subtrees. A collective call at these steps."""
        for layer in self.layers:
            loads, table = layer.subtree_loads, layer.table
            if loads is None or table is None or self.rebalance_every is None:
                continue
            loads.commit()
            if loads.num_steps < self.rebalance_every:
                continue
            plan = layer.plan.rebalanced(loads.pool(self.world))
            for _, store in table.stores():
                add_state(store)  # the same on all ranks, of which some may have no row yet
            move_subtrees(table, plan, self.expert)
            layer.plan, layer.subtree_loads = plan, SubtreeLoads.none(plan)

    def discard(self) -> None:
        """Forget the reduced gradient, new nodes and the pooled statistics, of a step that is not applied."""
        self._updates, self._statistics = [], []
        for layer in self.layers:
            if layer.table is not None:
                layer.table.forget_new()
            if layer.subtree_loads is not None:
                layer.subtree_loads.forget()


def _square(parts: list[_Part]) -> Tensor:
    """Squared norm of the gradients, float64 [1] on the CPU."""
    total = torch.zeros(1, dtype=torch.float64)
    for part in parts:
        flat = part.grad_GW.flatten()
        if native.computes(flat):
            total += native.square(flat)
            continue
        square = torch.zeros((), dtype=torch.float64, device=flat.device)
        for block in flat.split(SQUARE_NUMBERS if flat.device.type == "cpu" else max(1, len(flat))):
            double = block.double()
            square += torch.dot(double, double)
        total += square.cpu()
    return total
