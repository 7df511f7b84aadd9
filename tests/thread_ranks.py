"""Ranks as threads of one process: tests of collective calls that start no processes and end when a rank fails."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distcond.optim import RowAdam
from distcond.optim.sharded import ShardedRows
from distcond.table import Collective
from tests.helpers import HANG_S

_turn = threading.Lock()
"Held by the rank that computes: threads that take the interpreter from each other cost a third more processor time."


class ThreadGroup:
    """The functions of torch.distributed that `Collective` uses, among `size` threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=HANG_S)
        self._given: list[Any] = [None] * size
        self._me = threading.local()

    def collective(self, rank: int) -> Collective:
        """The calling thread's access to the group, as its rank `rank`."""
        self._me.rank = rank
        collective = Collective(None, self)
        collective.rank, collective.size = rank, len(self._given)
        return collective

    def abort(self) -> None:
        """Let every waiting rank fail."""
        self._barrier.abort()

    def all_reduce(self, tensor: Tensor, op: Any, group: Any) -> None:
        parts = torch.stack(self._exchange(tensor.clone()))
        tensor.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))

    def broadcast(self, tensor: Tensor, src: int, group: Any) -> None:
        tensor.copy_(self._exchange(tensor.clone())[src])

    def all_gather(self, out: list[Tensor], tensor: Tensor, group: Any) -> None:
        for place, part in zip(out, self._exchange(tensor.clone()), strict=True):
            place.copy_(part)

    def all_to_all_single(self, out: Tensor, tensor: Tensor, receive: list[int], send: list[int], group: Any) -> None:
        given = self._exchange(tensor.clone().split(send))
        parts = [runs[self._me.rank] for runs in given]
        assert [len(part) for part in parts] == receive
        out.copy_(torch.cat(parts))

    def _exchange(self, value: Any) -> list[Any]:
        self._given[self._me.rank] = value
        self._wait()
        values = list(self._given)
        self._wait()
        return values

    def _wait(self) -> None:
        _turn.release()
        try:
            self._barrier.wait()
        finally:
            _turn.acquire()


def run_threads(work: Callable[[int], Any], groups: Sequence[ThreadGroup], size: int) -> list[Any]:
    """Results of `work(rank)` on `size` threads; a failure on one rank ends all of them and is raised here."""
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with _turn:
                results[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 (raised again below)
            failures.append(error)
            for group in groups:
                group.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * HANG_S)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


class Groups:
    """World, expert-parallel and replica groups of `world` ranks."""

    def __init__(self, world: int, expert: int) -> None:
        self.size, self.expert_size = world, expert
        self.world = ThreadGroup(world)
        self.expert = [ThreadGroup(expert) for _ in range(world // expert)]
        self.replica = [ThreadGroup(world // expert) for _ in range(expert)]

    def run(self, work: Any) -> list[Any]:
        return run_threads(work, [self.world, *self.expert, *self.replica], self.size)

    def shard(
        self, rank: int, model: nn.Module, shard_level: int | None = None, rebalance_every: int | None = None, **options: Any
    ) -> ShardedRows:
        block, place = divmod(rank, self.expert_size)
        return ShardedRows(
            model,
            RowAdam(model, **options),
            world=self.world.collective(rank),
            expert=self.expert[block].collective(place),
            replica=self.replica[place].collective(block),
            shard_level=shard_level,
            rebalance_every=rebalance_every,
        )
