"""Adam over the rows of node tables: a step costs what was touched, not what exists.

A row's clock counts its own updates and corrects its own bias; moments rest while a row is untouched; decoupled weight
decay is caught up at the next touch. A row is touched when a token was routed to it, whatever its gradient.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distcond.nn.tree import TreeLinear
from distcond.table import RowStore

BLOCK_NUMBERS = 2**16
"Numbers updated at a time; a block and its moments stay in a 2 MiB cache."


def add_state(store: RowStore) -> None:
    """Give the rows of a store what Adam keeps per row."""
    for name in ("exp_avg", "exp_avg_sq"):
        store.add_state(name, (store.width,), store.data.dtype)
    store.add_state("clock", (), torch.int64)
    store.add_state("log_decay", (), torch.float64)


class RowAdam:
    """Adam for the nodes of every `TreeLinear` in a module; ordinary parameters are left to their own optimiser.

    Serves both storages: the rows of lazy tables, and the node parameters of dense layers (keep those out of the other
    optimiser). `step` also commits the gates' statistics. lr: may be changed between steps through the attribute.
    Raises ValueError for options that are out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps <= 0 or not all(0 <= beta < 1 for beta in betas) or not 0 <= lr * weight_decay < 1:
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: needed are lr >= 0, betas in [0, 1), eps > 0 "
                "and lr x weight_decay in [0, 1)"
            )
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.layers = [layer for layer in module.modules() if isinstance(layer, TreeLinear)]
        self.log_decay = 0.0
        "Sum over all steps of log(1 - lr x weight_decay)."
        self._dense_state: dict[Tensor, dict[str, Tensor]] = {}
        for layer in self.layers:
            layer.commits_by_itself = False
            layer.records_touched = layer.table is None
        for store in self.stores():
            store.clear_state()

    def stores(self) -> Iterator[RowStore]:
        """The row stores of lazy layers, in the order of the modules."""
        for layer in self.layers:
            if layer.table is not None:
                yield from (store for _, store in layer.table.stores())

    @torch.no_grad()
    def step(self) -> None:
        """One update of every touched row from its gradient."""
        self.step_rows([(store, *store.take_gradient()) for store in self.stores()])
        for layer in self.layers:
            if layer.table is None:
                self._step_dense(layer)
            layer.commit_statistics()

    @torch.no_grad()
    def step_rows(self, gradients: list[tuple[RowStore, Tensor, Tensor]]) -> None:
        """One update from given gradients: (store, rows int64 [G], gradient [G, width]) each."""
        self.log_decay += math.log1p(-self.lr * self.weight_decay)
        for store, rows_G, grad_GW in gradients:
            add_state(store)
            self._update(store.data, store.state, rows_G, grad_GW)

    def zero_grad(self) -> None:
        """Forget collected gradients (dense layers: of their node parameters)."""
        for store in self.stores():
            store.take_gradient()
        for layer in self.layers:
            layer.take_touched()
            for parameter in _node_parameters(layer):
                parameter.grad = None

    def _step_dense(self, layer: TreeLinear) -> None:
        touched = layer.take_touched()
        first_low = 2 ** (layer.full_depth + 1) - 1
        full, low = touched[touched < first_low], touched[touched >= first_low] - first_low
        for parameter, rows_G in zip(_node_parameters(layer), (full, full, low, low), strict=True):
            if parameter.grad is None or not parameter.numel():
                continue
            state = self._dense_state.setdefault(parameter, {})
            if not state:
                state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["clock"] = torch.zeros(len(parameter), dtype=torch.int64, device=parameter.device)
                state["log_decay"] = torch.zeros(len(parameter), dtype=torch.float64, device=parameter.device)
            self._update(parameter.data, state, rows_G, parameter.grad[rows_G])

    def _update(self, data_S: Tensor, state: dict[str, Tensor], rows_G: Tensor, grad_G: Tensor) -> None:
        """Adam on some rows of a tensor and of its state, in place, in blocks that stay in the cache."""
        block = max(1, BLOCK_NUMBERS // max(1, grad_G[:1].numel()))
        for rows_B, grad_B in zip(rows_G.split(block), grad_G.split(block), strict=True):
            if len(rows_B):
                self._update_block(data_S, state, rows_B, grad_B)

    def _update_block(self, data_S: Tensor, state: dict[str, Tensor], rows_B: Tensor, grad_B: Tensor) -> None:
        beta1, beta2 = self.betas
        per_row = (-1, *[1] * (grad_B.dim() - 1))
        clock_B = state["clock"][rows_B] + 1
        data_B, exp_avg, exp_avg_sq = (x.index_select(0, rows_B) for x in (data_S, state["exp_avg"], state["exp_avg_sq"]))
        exp_avg.lerp_(grad_B, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad_B, grad_B, value=1 - beta2)
        correction1 = (1 - beta1 ** clock_B.double()).to(grad_B.dtype).view(per_row)
        correction2 = (1 - beta2 ** clock_B.double()).sqrt().to(grad_B.dtype).view(per_row)
        if self.weight_decay:
            missed_B = (self.log_decay - state["log_decay"][rows_B]).exp().to(grad_B.dtype)
            data_B *= missed_B.view(per_row)
        denominator = exp_avg_sq.sqrt().div_(correction2).add_(self.eps).mul_(correction1)
        data_B.addcdiv_(exp_avg, denominator, value=-self.lr)
        for tensor_S, value_B in ((data_S, data_B), (state["exp_avg"], exp_avg), (state["exp_avg_sq"], exp_avg_sq)):
            tensor_S.index_copy_(0, rows_B, value_B)
        state["clock"][rows_B], state["log_decay"][rows_B] = clock_B, self.log_decay


def _node_parameters(layer: TreeLinear) -> tuple[Tensor, ...]:
    return () if layer.table is not None else (layer.weight, layer.bias, layer.right, layer.left)
