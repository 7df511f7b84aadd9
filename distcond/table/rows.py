"""Rows by node id: a growing matrix whose row i belongs to node `keys[i]`, with columns of optimiser state beside it."""

from typing import Self

import torch
from torch import Tensor


class RowStore:
    """Append-only rows of one width, found by int64 key.

    Rows keep their place for life, so indices stay valid while the store grows. The gradient of touched rows is
    collected by `add_gradient` over micro-batches and ponder steps and coalesced once, by `take_gradient`.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.width = width
        self.size = 0
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self._data = torch.empty(0, width, dtype=torch.float32, device=device)
        self._state: dict[str, Tensor] = {}
        self._sorted_keys = self.keys
        self._sorted_rows = self.keys
        self._pending: list[tuple[Tensor, Tensor]] = []

    @property
    def data(self) -> Tensor:
        """The rows, [size, width]; writing to it writes to the store."""
        return self._data[: self.size]

    @property
    def state(self) -> dict[str, Tensor]:
        """Optimiser state of the rows, by name, each [size, ...]."""
        return {name: value[: self.size] for name, value in self._state.items()}

    def add_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Give every row, now and later, zeros of this shape under this name; a name that exists is kept."""
        if name not in self._state:
            self._state[name] = torch.zeros(len(self._data), *shape, dtype=dtype, device=self._data.device)

    def state_of(self, keys_G: Tensor) -> dict[str, Tensor]:
        """Optimiser state of the rows under these keys, zeros where there is no row."""
        rows_G = self.find(keys_G)
        missing_G = rows_G < 0
        state: dict[str, Tensor] = {}
        for name, value in self._state.items():
            state[name] = value.new_zeros(len(keys_G), *value.shape[1:])
            state[name][~missing_G] = value[rows_G[~missing_G]]
        return state

    def clear_state(self) -> None:
        """Forget the optimiser state of every row."""
        self._state = {}

    def find(self, keys_G: Tensor) -> Tensor:
        """Row of each key, int64, -1 where there is none."""
        if not self.size:
            return torch.full_like(keys_G, -1)
        place_G = torch.searchsorted(self._sorted_keys, keys_G).clamp_(max=self.size - 1)
        return torch.where(self._sorted_keys[place_G] == keys_G, self._sorted_rows[place_G], -1)

    def append(self, keys_G: Tensor, data_GW: Tensor) -> None:
        """Add rows under new, distinct keys."""
        start, self.size = self.size, self.size + len(keys_G)
        self._reserve(self.size)
        self._data[start : self.size] = data_GW
        self.keys = torch.cat([self.keys, keys_G])
        self._sorted_keys, self._sorted_rows = torch.sort(self.keys)

    def replace(self, keys_N: Tensor, data_NW: Tensor, state: dict[str, Tensor] | None = None) -> None:
        """Throw all rows away and hold these instead, in this order."""
        self.size = len(keys_N)
        self.keys, self._data = keys_N.clone(), data_NW.clone()
        self._state = {name: value.clone() for name, value in (state or {}).items()}
        self._sorted_keys, self._sorted_rows = torch.sort(self.keys)
        self._pending = []

    def keep(self, mask_N: Tensor) -> None:
        """Keep only the rows where the mask is true, in their order."""
        self.replace(self.keys[mask_N], self.data[mask_N], {name: value[mask_N] for name, value in self.state.items()})

    def _reserve(self, size: int) -> None:
        capacity = len(self._data)
        if size <= capacity:
            return
        extra = max(size, 2 * capacity) - capacity
        self._data = torch.cat([self._data, self._data.new_zeros(extra, self.width)])
        for name, value in self._state.items():
            self._state[name] = torch.cat([value, value.new_zeros(extra, *value.shape[1:])])

    def add_gradient(self, rows_G: Tensor, grad_GW: Tensor) -> None:
        """Add to the gradient of rows (distinct within one call, in the order of their keys)."""
        self._pending.append((rows_G, grad_GW))

    def take_gradient(self) -> tuple[Tensor, Tensor]:
        """The collected gradient: touched rows by ascending key, [G], and its sum per row, [G, width]; forgets it."""
        pending, self._pending = self._pending, []
        if not pending:
            return self.keys.new_empty(0), self._data.new_empty(0, self.width)
        if len(pending) == 1:
            return pending[0]
        keys_G, index = torch.unique(self.keys[torch.cat([rows_G for rows_G, _ in pending])], return_inverse=True)
        grad_GW = self._data.new_zeros(len(keys_G), self.width)
        grad_GW.index_add_(0, index, torch.cat([grad for _, grad in pending]))
        return self.find(keys_G), grad_GW

    def move(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move to a device and floating-point type, in place."""
        self._data = self._data.to(device=device, dtype=dtype)
        self._state = {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
            for name, value in self._state.items()
        }
        self.keys, self._sorted_keys = self.keys.to(device), self._sorted_keys.to(device)
        self._sorted_rows = self._sorted_rows.to(device)
        return self
