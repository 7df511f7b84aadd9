"""Rows of node tables spread over ranks: their gradient as the mean over ranks, its norm, and their update.

Rows of replicated nodes (above the plan's shard level) are summed over all ranks, rows of sharded nodes over the ranks
that hold the same part of the tables. Every rank calls every collective equally often, whatever it was routed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcond.nn.tree import TreeLinear
from distcond.optim.row_adam import RowAdam
from distcond.table import Collective, RowStore, SubtreePlan


@dataclass(slots=True)
class _Part:
    """Rows of one store whose gradient has been summed: the ones that every rank holds, or this rank's own."""

    store: RowStore
    rows_G: Tensor
    grad_GW: Tensor
    replicated: bool


class ShardedRows:
    """The lazy tables of a model under expert parallelism: who holds what, and one optimiser for it.

    world: all ranks. expert: the ranks that share one copy of the tables. replica: the ranks with the same part.
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
    ) -> None:
        self.optimizer = optimizer
        self.world, self.expert, self.replica = world, expert, replica
        self.layers = [layer for layer in optimizer.layers if layer.table is not None]
        self._parts: list[_Part] = []
        for layer in optimizer.layers:
            layer.records_touched = False  # nodes that are parameters have the dense part's optimiser
            self._take_from_first_rank(layer)
        for layer in self.layers:
            layer.shard(SubtreePlan.make(layer.depth, expert.size, shard_level), expert)

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
        """Turn what backward collected into mean gradients over ranks; returns their squared norm, float32 scalar."""
        self._parts = [part for layer in self.layers for part in self._reduce_layer(layer)]
        own = torch.zeros(1, dtype=torch.float64)
        shared = torch.zeros(1, dtype=torch.float64)
        for part in self._parts:
            (shared if part.replicated else own).add_(part.grad_GW.double().square().sum().cpu())
        return (self.expert.sum_(own) + shared)[0].float()

    def _reduce_layer(self, layer: TreeLinear) -> Iterator[_Part]:
        assert layer.table is not None
        for name, store in layer.table.stores():
            rows_G, grad_GW = store.take_gradient()
            replicated_G = layer.plan.node_owner(store.keys[rows_G]) < 0
            for mask_G, group, replicated in ((replicated_G, self.world, True), (~replicated_G, self.replica, False)):
                keys_G = store.keys[rows_G[mask_G]]
                grad = grad_GW[mask_G]
                if group.size > 1:
                    keys_G, grad = self._sum_over(group, layer, name, keys_G, grad)
                yield _Part(store, store.find(keys_G), grad / self.world.size, replicated)

    def _sum_over(self, group: Collective, layer: TreeLinear, name: str, keys_G: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient summed over a group, for the union of its keys; rows that are new here are born."""
        assert layer.table is not None
        store = dict(layer.table.stores())[name]
        union_G = group.gather_union(keys_G)
        total = grad.new_zeros(len(union_G), store.width)
        total[torch.searchsorted(union_G, keys_G)] = grad
        missing_G = union_G[store.find(union_G) < 0]
        if len(missing_G):
            store.append(missing_G, layer.table.newborn(name, missing_G))
        return union_G, group.sum_(total)

    @torch.no_grad()
    def step(self, lr: float, scale: float) -> None:
        """Apply the reduced gradient times `scale`, and commit the gates' statistics, pooled over all ranks."""
        self.optimizer.lr = lr
        updates = [(part.store, part.rows_G, part.grad_GW * scale) for part in self._parts]
        self._parts = []
        self.optimizer.step_rows(updates)
        for layer in self.optimizer.layers:
            layer.commit_statistics(self.world)

    def discard(self) -> None:
        """Forget the reduced gradient and the staged statistics of a step that is not applied."""
        self._parts = []
        for layer in self.optimizer.layers:
            if layer.gate is not None:
                layer.gate.take_statistics()
