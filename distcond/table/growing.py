"""A tensor that grows by rows in place, for tables whose size nobody knows beforehand."""

import contextlib
import itertools
import mmap
import sys
from math import prod
from typing import Any

import torch
from torch import Tensor

RESERVED_BYTES = 2**35
"Address space reserved at first, 32 GiB; what outgrows it moves to a place twice its size."
COLOR_BYTES = 2**28
"""Tensors begin at addresses that are multiples of it but for their color, a number of pages.

NOTE: a core of AMD's predicts the ways of its first cache from these bits of an address (Lipp et al. 2020, doi
10.1145/3320269.3384746). Adam on rows that had them in common with their moments took 1.7 to 2.1 times as long on an EPYC.
"""
HUGE_FROM = 2**23
"""Bytes of a tensor behind which it lies in huge pages, where the system has any: 2 MiB cost a small one more than they save.

NOTE: forward, backward and update of tables of 66 MB to 1.4 GB take 3 to 10% less time, gradients in huge pages,
too (measured from 2 and from 16 MiB on).
"""
GROWTH = 1.25
"Capacity over size where address space cannot be reserved."
MAP_NORESERVE = 0x4000
"As Linux has it; Python names it from 3.13 on."
_colors = itertools.cycle(range(256))


class Growing:
    """Rows of one shape, [size, *shape]; new ones are zeros.

    On a CPU under Linux, address space is reserved and memory taken page by page as rows are written: growth copies nothing
    and holds nothing spare. Elsewhere, and where the system refuses, it moves to a place a quarter larger.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> None:
        self._shape = shape
        self._map: mmap.mmap | None = None
        self._start = 0
        "Of the rows in what is reserved, bytes."
        self._buffer = self.tensor = torch.zeros(0, *shape, dtype=dtype, device=device)
        self._capacity = 0

    @classmethod
    def of(cls, tensor: Tensor) -> "Growing":
        """A copy of a tensor that can grow."""
        growing = cls(tuple(tensor.shape[1:]), tensor.dtype, tensor.device)
        growing.resize(len(tensor))
        growing.tensor.copy_(tensor)
        return growing

    def resize(self, size: int) -> None:
        """Grow or shrink to this many rows. `tensor` is another object afterwards, over the same rows."""
        row_numbers = prod(self._shape)
        if size < len(self.tensor):
            self._erase(size)
        if size >= self._capacity and row_numbers:
            self._move(size, row_numbers)
        self.tensor = self._rows(size)

    def with_zeros(self) -> Tensor:
        """The rows and one more of zeros, [size + 1, *shape], which is not to be written to."""
        if not self._capacity:
            self.resize(len(self.tensor))
        return self._rows(len(self.tensor) + 1)

    def _erase(self, size: int) -> None:
        """Make zeros of the rows from `size` on, which may come again as new ones, and give their memory back."""
        end = len(self.tensor)
        if self._map is not None:
            row_bytes = self.tensor[0].numel() * self.tensor.element_size()
            first_page = -(-size * row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            if first_page < end * row_bytes:
                self._map.madvise(mmap.MADV_DONTNEED, self._start + first_page, end * row_bytes - first_page)
            end = min(end, -(-first_page // row_bytes))
        self.tensor[size:end] = 0

    def _rows(self, size: int) -> Tensor:
        row_numbers = prod(self._shape)
        if self._map is None or not size:
            return self._buffer[:size] if row_numbers else self.tensor.new_zeros(size, *self._shape)
        # NOTE: not a view of all that is reserved, which torch.save would write
        flat = torch.frombuffer(self._map, dtype=self.tensor.dtype, count=size * row_numbers, offset=self._start)
        return flat.view(size, *self._shape)

    def _move(self, size: int, row_numbers: int) -> None:
        old, row_bytes = self.tensor, row_numbers * self.tensor.element_size()
        reserved = max(RESERVED_BYTES, 2 * size * row_bytes)
        self._map = _reserve(reserved + COLOR_BYTES) if old.device.type == "cpu" else None
        if self._map is None:
            self._capacity = int(GROWTH * size) + 1
            self._buffer = old.new_zeros(self._capacity, *self._shape)
            self._buffer[: len(old)] = old
        else:
            self._start = (next(_colors) * mmap.PAGESIZE - _address(self._map)) % COLOR_BYTES
            if reserved > HUGE_FROM:
                with contextlib.suppress(OSError):  # a system without huge pages
                    self._map.madvise(mmap.MADV_HUGEPAGE, self._start + HUGE_FROM, reserved - HUGE_FROM)
            self._capacity = reserved // row_bytes
            self._rows(len(old)).copy_(old)

    def __reduce__(self) -> tuple[Any, tuple[Tensor]]:
        return Growing.of, (self.tensor,)


def huge_empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory for a tensor of this shape, contiguous; a large one on a CPU lies in huge pages (HUGE_FROM)."""
    size = tensor.numel() * tensor.element_size()
    memory = _reserve(size) if tensor.device.type == "cpu" and size >= HUGE_FROM else None
    if memory is None:
        return tensor.new_empty(tensor.shape)
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def _reserve(size: int) -> mmap.mmap | None:
    """Zeros that take memory once they are written; None where there is no such thing."""
    if sys.platform != "linux":
        return None
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError:  # a limit on address space
        return None


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
