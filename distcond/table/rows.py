"""Rows by node id: a growing matrix whose row i belongs to node `keys[i]`, with columns of optimiser state beside it."""

from typing import Any, Self

import torch
from torch import Tensor

from distcond.table.growing import Growing
from distcond.table.key_index import KeyIndex


class RowStore:
    """Rows of one width, found by int64 key.

    Rows keep their place for life, so indices stay valid while the store grows; those that were added for a step and did
    not come to stay (`keep_new`) make way for others. The gradient of touched rows is collected by `add_gradient` over
    micro-batches and ponder steps and coalesced once, by `take_gradient`.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.width = width
        self._keys = Growing((), torch.int64, device)
        self._data = Growing((width,), torch.float32, device)
        self._state: dict[str, Growing] = {}
        self._index = KeyIndex()
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._spare = self._no_rows()
        self.num_settled = 0
        "Rows that are there to stay; those behind them were added since the last step."
        self.num_removals = 0
        "Times that rows were removed: indices from before may be of other rows now."

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self._keys.tensor)

    @property
    def keys(self) -> Tensor:
        """Key of each row, int64 [size]."""
        return self._keys.tensor

    @property
    def data(self) -> Tensor:
        """The rows, [size, width]; writing to it writes to the store."""
        return self._data.tensor

    @property
    def data_with_zeros(self) -> Tensor:
        """The rows and one of zeros behind them, [size + 1, width], to read from."""
        return self._data.with_zeros()

    @property
    def state(self) -> dict[str, Tensor]:
        """Optimiser state of the rows, by name, each [size, ...]."""
        return {name: value.tensor for name, value in self._state.items()}

    def add_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Give every row, now and later, zeros of this shape under this name; a name that exists is kept."""
        if name not in self._state:
            self._state[name] = Growing(shape, dtype, self.data.device)
            self._state[name].resize(self.size)

    def state_of(self, keys_G: Tensor) -> dict[str, Tensor]:
        """Optimiser state of the rows under these keys, zeros where there is no row."""
        rows_G = self.find(keys_G)
        missing_G = rows_G < 0
        state: dict[str, Tensor] = {}
        for name, value in self.state.items():
            state[name] = value.new_zeros(len(keys_G), *value.shape[1:])
            state[name][~missing_G] = value[rows_G[~missing_G]]
        return state

    def clear_state(self) -> None:
        """Forget the optimiser state of every row."""
        self._state = {}

    def find(self, keys_G: Tensor) -> Tensor:
        """Row of each key, int64, -1 where there is none."""
        return self._index.find(keys_G)

    def append(self, keys_G: Tensor, data_GW: Tensor | None) -> None:
        """Add rows under new, distinct keys; None: zeros, which take no memory before they are written to."""
        start, size = self.size, self.size + len(keys_G)
        for growing in (self._keys, self._data, *self._state.values()):
            growing.resize(size)
        self.keys[start:] = keys_G
        if data_GW is not None:
            self.data[start:] = data_GW
        self._index.insert(keys_G, torch.arange(start, size, device=keys_G.device))

    def settle(self) -> None:
        """Let all rows stay."""
        self.num_settled = self.size

    def keep_new(self, keys_G: Tensor) -> None:
        """Let those of the rows added since `settle` stay that have one of these keys, and remove the others."""
        start = self.num_settled
        if start < self.size:
            new_N = self.keys[start:].clone()
            kept_N = torch.isin(new_N, keys_G)
            if not bool(kept_N.all()):
                self._remove_new(start, new_N[kept_N], kept_N)
        self.settle()

    def _remove_new(self, start: int, keys_G: Tensor, kept_N: Tensor) -> None:
        """Keep some of the rows from `start` on; they have no optimiser state yet."""
        data_GW = self.data[start:][kept_N]
        self._index.drop(start)
        for growing in (self._keys, self._data, *self._state.values()):
            growing.resize(start)
        self._pending = []
        self.num_removals += 1
        self.append(keys_G, data_GW)

    def take(self, rows_G: Tensor) -> dict[str, Tensor]:
        """Remove rows, whose places are taken by the last ones; returns copies of what they held, optimiser state included."""
        columns = {"keys": self.keys, "rows": self.data, **self.state}
        taken = {name: column[rows_G] for name, column in columns.items()}
        size = self.size - len(rows_G)
        stays_N = torch.ones(self.size, dtype=torch.bool, device=rows_G.device)
        stays_N[rows_G] = False
        holes, last = rows_G[rows_G < size], stays_N[size:].nonzero()[:, 0] + size
        for column, growing in zip(columns.values(), (self._keys, self._data, *self._state.values()), strict=True):
            column[holes] = column[last]
            growing.resize(size)
        self._index = KeyIndex()
        self._index.insert(self.keys.clone(), torch.arange(size, device=rows_G.device))
        self.num_removals += 1
        self.settle()
        return taken

    def put(self, columns: dict[str, Tensor]) -> None:
        """Add what `take` returned elsewhere, to a store with the same optimiser state."""
        start = self.size
        self.append(columns["keys"], columns["rows"])
        for name, value in self.state.items():
            value[start:] = columns[name]
        self.settle()

    def replace(self, keys_N: Tensor, data_NW: Tensor, state: dict[str, Tensor] | None = None) -> None:
        """Throw all rows away and hold these instead, in this order."""
        self._keys, self._data = Growing.of(keys_N), Growing.of(data_NW)
        self._state = {name: Growing.of(value) for name, value in (state or {}).items()}
        self._index = KeyIndex()
        self._index.insert(keys_N, torch.arange(len(keys_N), device=keys_N.device))
        self._pending = []
        self.num_removals += 1
        self.settle()

    def keep(self, mask_N: Tensor) -> None:
        """Keep only the rows where the mask is true, in their order."""
        self.replace(self.keys[mask_N], self.data[mask_N], {name: value[mask_N] for name, value in self.state.items()})

    def new_gradient(self, number: int) -> Tensor:
        """Uninitialised rows for a gradient, [number, width].

        The first ones after `take_gradient` are the same memory at every step, for to take memory anew from the system costs
        more than to write it: what was taken holds until the next backward pass.
        """
        if self._pending:
            return self.data.new_empty(number, self.width)
        if (self._spare.tensor.dtype, self._spare.tensor.device) != (self.data.dtype, self.data.device):
            self._spare = self._no_rows()
        if number > len(self._spare.tensor):
            self._spare.resize(number)
        return self._spare.tensor[:number]

    def _no_rows(self) -> Growing:
        return Growing((self.width,), self.data.dtype, self.data.device)

    def add_gradient(self, rows_G: Tensor, grad_GW: Tensor) -> None:
        """Add to the gradient of rows (distinct within one call, in the order of their keys)."""
        self._pending.append((rows_G, grad_GW))

    def take_gradient(self) -> tuple[Tensor, Tensor]:
        """The collected gradient: touched rows by ascending key, [G], and its sum per row, [G, width]; forgets it."""
        pending, self._pending = self._pending, []
        if not pending:
            return self.keys.new_empty(0), self.data.new_empty(0, self.width)
        if len(pending) == 1:
            return pending[0]
        keys_G, index = torch.unique(self.keys[torch.cat([rows_G for rows_G, _ in pending])], return_inverse=True)
        grad_GW = self.data.new_zeros(len(keys_G), self.width)
        grad_GW.index_add_(0, index, torch.cat([grad for _, grad in pending]))
        return self.find(keys_G), grad_GW

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spare": self._no_rows()}

    def move(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move to a device and floating-point type, in place."""
        self._data = Growing.of(self.data.to(device=device, dtype=dtype))
        for name, value in self.state.items():
            kind = dtype if value.is_floating_point() else value.dtype
            self._state[name] = Growing.of(value.to(device=device, dtype=kind))
        self._keys = Growing.of(self.keys.to(device))
        self._index.to(device)
        return self
