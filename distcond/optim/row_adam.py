"""Adam over the rows of node tables: a step costs what was touched, not what exists.

A row's clock counts its own updates and corrects its own bias; moments rest while a row is untouched; decoupled weight
decay is caught up at the next touch. A row is touched when a token was routed to it, whatever its gradient.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from distcond.nn.tree import TreeLinear
from distcond.ops import calls_are_cheap, fused_rows, native
from distcond.table import Collective, NodeTable, RowStore, admit

WIDE_ROW = 2**13
"Numbers in a row from which on it is updated by itself: about 1 us of traffic, less than a call costs, lies below."
BLOCK_NUMBERS, DEVICE_BLOCK_NUMBERS = 2**17, 2**26
"Numbers of narrower rows that are updated at a time: some MiB with moments; where calls are dear, rows of any width, 1 GiB."


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
        for table in self.tables():
            table.adopt()
        for store in self.stores():
            store.clear_state()

    def tables(self) -> list[NodeTable]:
        """The tables of lazy layers, in the order of the modules."""
        return [layer.table for layer in self.layers if layer.table is not None]

    def stores(self) -> Iterator[RowStore]:
        """The row stores of lazy layers, in the order of the modules."""
        for table in self.tables():
            yield from (store for _, store in table.stores())

    @torch.no_grad()
    def step(self) -> None:
        """One update of every touched row from its gradient; nodes that the data asked for come to exist."""
        alone = Collective.alone()
        lazy = [(layer.table, layer.plan) for layer in self.layers if layer.table is not None]
        gradients = [[(store, *store.take_gradient()) for _, store in table.stores()] for table, _ in lazy]
        admissions = admit([(table.growth, plan) for table, plan in lazy], alone, alone, alone)
        updates: list[tuple[RowStore, Tensor, Tensor]] = []
        for (table, _), parts, admission in zip(lazy, gradients, admissions, strict=True):
            by_key = [] if admission is None else [(store, store.keys[rows_G], grad_GW) for store, rows_G, grad_GW in parts]
            table.settle(admission)
            updates += parts if admission is None else [_existing_rows(*part) for part in by_key]
        self.step_rows(updates)
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
        """Forget collected gradients (dense layers: of their node parameters), and nodes that were made for them."""
        for store in self.stores():
            store.take_gradient()
        for table in self.tables():
            table.forget_new()
        for layer in self.layers:
            layer.take_touched()
            for parameter in layer.node_parameters():
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What Adam keeps, for `torch.save` beside the module's own state dict; the options are not part of it."""
        rows = [{"keys": store.keys, **store.state} for store in self.stores()]
        return {"log_decay": self.log_decay, "rows": rows, "dense": [dict(self._dense_state.get(p, {})) for p in self._dense()]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError unless the module has taken over its own state before."""
        stores, dense = list(self.stores()), self._dense()
        found = [store.find(saved["keys"].to(store.keys.device)) for store, saved in zip(stores, state["rows"], strict=False)]
        if (len(state["rows"]), len(state["dense"])) != (len(stores), len(dense)) or any(bool((row < 0).any()) for row in found):
            raise ValueError("the state of RowAdam is of other nodes; load the state of the module that it was saved with first")
        self.log_decay = state["log_decay"]
        for store, rows, saved in zip(stores, found, state["rows"], strict=True):
            store.clear_state()
            for name, value in saved.items():
                if name != "keys":
                    store.add_state(name, value.shape[1:], value.dtype)
                    store.state[name][rows] = value.to(rows.device)
        moved = [
            {name: value.to(p.device, copy=True) for name, value in saved.items()}
            for p, saved in zip(dense, state["dense"], strict=True)
        ]
        self._dense_state = {p: saved for p, saved in zip(dense, moved, strict=True) if saved}

    def _dense(self) -> list[Tensor]:
        return [parameter for layer in self.layers for parameter in layer.node_parameters()]

    def _step_dense(self, layer: TreeLinear) -> None:
        touched = layer.take_touched()
        layer.layout.num_updates += 1
        first_low = layer.layout.num_full_ids
        full, low = touched[touched < first_low], touched[touched >= first_low] - first_low
        for parameter, rows_G in zip(layer.node_parameters(), (full, full, low, low), strict=True):
            if parameter.grad is None or not parameter.numel():
                continue
            state = self._dense_state.setdefault(parameter, {})
            if not state:
                state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["clock"] = torch.zeros(len(parameter), dtype=torch.int64, device=parameter.device)
                state["log_decay"] = torch.zeros(len(parameter), dtype=torch.float64, device=parameter.device)
            self._update(parameter.data, state, rows_G, parameter.grad[rows_G])

    def _update(self, data_S: Tensor, state: dict[str, Tensor], rows_G: Tensor, grad_G: Tensor) -> None:
        """Adam on some rows of a tensor and of its state, in place."""
        if not len(rows_G):
            return
        clock_G = state["clock"].index_select(0, rows_G)
        missed_G = (self.log_decay - state["log_decay"].index_select(0, rows_G)).exp() if self.weight_decay else None
        state["log_decay"].index_fill_(0, rows_G, self.log_decay)
        is_wide = grad_G[0].numel() >= WIDE_ROW and calls_are_cheap(data_S)
        update = self._update_rows if is_wide else self._update_blocks
        if native.computes(data_S, grad_G) and data_S.is_contiguous():
            update = self._update_compiled
        if fused_rows.serves(data_S, grad_G, rows_G) and data_S.is_contiguous() and data_S.dtype == torch.float32:
            update = self._update_fused
        update(data_S, state, rows_G, grad_G, clock_G, missed_G)
        state["clock"].index_copy_(0, rows_G, clock_G + 1)

    def _update_fused(
        self, data_S: Tensor, state: dict[str, Tensor], rows_G: Tensor, grad_G: Tensor, clock_G: Tensor, missed_G: Tensor | None
    ) -> None:
        """Rows of any width, by a kernel of a GPU: one pass over memory."""
        moments, clock_S = (state["exp_avg"], state["exp_avg_sq"]), state["clock"]
        fused_rows.adam(data_S, moments, rows_G, grad_G, clock_S, missed_G, lr=self.lr, betas=self.betas, eps=self.eps)

    def _update_compiled(
        self, data_S: Tensor, state: dict[str, Tensor], rows_G: Tensor, grad_G: Tensor, clock_G: Tensor, missed_G: Tensor | None
    ) -> None:
        """Rows of any width, by a compiled loop: one pass over memory."""
        beta1, beta2 = self.betas
        size_G = self.lr / (1 - beta1 ** (clock_G + 1).double())
        root_G = (1 - beta2 ** (clock_G + 1).double()).sqrt()
        decay_G = torch.ones_like(size_G) if missed_G is None else missed_G
        moments = (state["exp_avg"], state["exp_avg_sq"])
        native.adam(data_S, moments, rows_G, grad_G, (decay_G, size_G, root_G), self.betas, self.eps)

    def _update_rows(
        self, data_S: Tensor, state: dict[str, Tensor], rows_G: Tensor, grad_G: Tensor, clock_G: Tensor, missed_G: Tensor | None
    ) -> None:
        """Wide rows: torch's fused Adam on each where it is, one pass over memory."""
        rows = rows_G.tolist()
        data, exp_avg, exp_avg_sq = ([tensor[row] for row in rows] for tensor in (data_S, state["exp_avg"], state["exp_avg_sq"]))
        if missed_G is not None:
            torch._foreach_mul_(data, missed_G.tolist())
        beta1, beta2 = self.betas
        adam(
            data,
            list(grad_G.unbind()),
            exp_avg,
            exp_avg_sq,
            [],
            list(clock_G.to(torch.float32).unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.lr,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )

    def _update_blocks(
        self, data_S: Tensor, state: dict[str, Tensor], rows_G: Tensor, grad_G: Tensor, clock_G: Tensor, missed_G: Tensor | None
    ) -> None:
        """Narrow rows: copied together in blocks, which stay in the cache from the first operation to the last."""
        beta1, beta2 = self.betas
        per_row = (-1, *[1] * (grad_G.dim() - 1))
        correction1 = 1 - beta1 ** (clock_G + 1).double()
        correction2 = (1 - beta2 ** (clock_G + 1).double()).sqrt()
        # m / c1 / (sqrt(v) / c2 + eps) with the corrections on one side: one pass less
        ratio_G = (correction1 / correction2).to(grad_G.dtype).view(per_row)
        offset_G = (self.eps * correction1).to(grad_G.dtype).view(per_row)
        most = BLOCK_NUMBERS if calls_are_cheap(data_S) else DEVICE_BLOCK_NUMBERS
        size = max(1, most // max(1, grad_G[0].numel()))
        data, exp_avg, exp_avg_sq = (grad_G.new_empty(min(size, len(rows_G)), *grad_G.shape[1:]) for _ in range(3))
        for low in range(0, len(rows_G), size):
            part = slice(low, low + size)
            rows_B, grad_B = rows_G[part], grad_G[part]
            data_B, avg_B, square_B = (x[: len(rows_B)] for x in (data, exp_avg, exp_avg_sq))
            torch.index_select(state["exp_avg"], 0, rows_B, out=avg_B)
            state["exp_avg"].index_copy_(0, rows_B, avg_B.lerp_(grad_B, 1 - beta1))
            torch.index_select(state["exp_avg_sq"], 0, rows_B, out=square_B)
            square_B.mul_(beta2).addcmul_(grad_B, grad_B, value=1 - beta2)
            state["exp_avg_sq"].index_copy_(0, rows_B, square_B)
            square_B.sqrt_().mul_(ratio_G[part]).add_(offset_G[part])
            torch.index_select(data_S, 0, rows_B, out=data_B)
            if missed_G is not None:
                data_B *= missed_G[part].to(grad_G.dtype).view(per_row)
            data_S.index_copy_(0, rows_B, data_B.addcdiv_(avg_B, square_B, value=-self.lr))


def _existing_rows(store: RowStore, keys_G: Tensor, grad_GW: Tensor) -> tuple[RowStore, Tensor, Tensor]:
    """A gradient by key as one by row, without that of rows which did not come to exist."""
    rows_G = store.find(keys_G)
    mask_G = rows_G >= 0
    return (store, rows_G, grad_GW) if bool(mask_G.all()) else (store, rows_G[mask_G], grad_GW[mask_G])
