"""The few collective operations that sharded tables need, over any library with torch.distributed's functions."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Collective:
    """Collectives of one process group; counts what it sends and how long it waits.

    library: `torch.distributed`, or a module with the same functions (`deepspeed.comm`, whose logger then sees them).
    A group of one rank communicates nothing.
    """

    def __init__(self, group: Any = None, library: Any = dist) -> None:
        self._group, self._library = group, library
        distributed = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank(group) if distributed else 0
        self.size: int = dist.get_world_size(group) if distributed else 1
        is_nccl = self.size > 1 and dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else None
        "Where the group's tensors must be: rows and small sums may be on the host. None: anywhere."
        self.sent_bytes = 0
        self.elapsed_s = 0.0

    @classmethod
    def alone(cls) -> "Collective":
        """A group of this process alone, whatever groups there are."""
        collective = cls()
        collective.rank, collective.size = 0, 1
        return collective

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in place."""
        if self.size > 1:
            moved = self._moved(tensor)
            self._library.broadcast(moved, src=dist.get_global_rank(self._group, 0) if self._group else 0, group=self._group)
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            start = time.perf_counter()
            moved = self._moved(tensor)
            self._library.all_reduce(moved, op=op, group=self._group)
            if moved is not tensor:
                tensor.copy_(moved)
            self.elapsed_s += time.perf_counter() - start
        return tensor

    def all_to_all(self, tensor_T: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Rows in runs of `send` lengths, one run a rank; returns the runs received, of `receive` lengths."""
        if self.size == 1:
            return tensor_T
        start = time.perf_counter()
        out_T = tensor_T.new_empty(sum(receive), *tensor_T.shape[1:])
        self._library.all_to_all_single(out_T, tensor_T.contiguous(), receive, send, group=self._group)
        self.elapsed_s += time.perf_counter() - start
        kept = send[self.rank]
        row_bytes = tensor_T[0:1].numel() * tensor_T.element_size() if len(tensor_T) else 0
        self.sent_bytes += (len(tensor_T) - kept) * row_bytes
        return out_T

    def gather_union(self, keys_G: Tensor) -> Tensor:
        """Sorted distinct int64 keys held by any rank."""
        union_G: Tensor = torch.unique(torch.cat([key for keys in self.gather_runs([keys_G]) for key in keys]))
        return union_G

    def gather_runs(self, runs: list[Tensor]) -> list[list[Tensor]]:
        """Every rank's tensors of int64, rank by rank; lengths may differ between ranks, their number may not."""
        if self.size == 1:
            return [runs]
        start = time.perf_counter()
        lengths = self._gather(torch.tensor([len(run) for run in runs], device=runs[0].device))
        longest = max(int(length.sum()) for length in lengths)
        padded = torch.nn.functional.pad(torch.cat(runs), (0, longest - sum(len(run) for run in runs)))
        gathered = self._gather(padded)
        self.elapsed_s += time.perf_counter() - start
        return [list(part[: int(length.sum())].split(length.tolist())) for part, length in zip(gathered, lengths, strict=True)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of one shape from every rank."""
        moved = self._moved(tensor)
        parts = [torch.empty_like(moved) for _ in range(self.size)]
        self._library.all_gather(parts, moved, group=self._group)
        return [part.to(tensor.device) for part in parts]

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)
