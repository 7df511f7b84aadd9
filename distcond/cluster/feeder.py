"""Batches computed ahead of the step by a Ray actor on the worker's own node.

The actor holds a `distcond.data` task and no state: a batch is a pure function of (seed, step, micro), so it may be
killed and restarted at any time, and any step may be asked for next. It imports numpy, never torch.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distcond.config import Config
from distcond.data.batches import Batch, LocalFeeder, num_validation_batches
from distcond.errors import UserError

PATIENCE_S = 1.0
"How long a batch is waited for before asking whether there is still somebody to compute it."


class RayFeeder:
    """One rank's batches, `depth` of them computed ahead of the one asked for. A `distcond.data.batches.Feeder`."""

    def __init__(self, config: Config, rank: int, world_size: int, depth: int = 4) -> None:
        self.actor = ray.remote(_DataActor).options(**_placement()).remote(config, rank, world_size)
        self._accumulation = config.optim.accumulation
        self._num_validation = num_validation_batches(config, world_size)
        # What the actor is not there to compute, the rank computes itself: a new process may take 10 s on busy cores.
        stand_in = _DataActor(config, rank, world_size)
        self._training = _Ahead(self.actor, "get", stand_in, depth)
        self._validating = _Ahead(self.actor, "validation", stand_in, depth)

    def get(self, step: int, micro: int) -> Batch:
        """The rank's slice of micro-batch `micro` of step `step`; in order it is ready, out of order it is waited for."""
        first = step * self._accumulation + micro
        return self._training.take(divmod(index, self._accumulation) for index in count(first))

    def validation(self, index: int) -> Batch:
        """The rank's slice of validation micro-batch `index`."""
        return self._validating.take((following,) for following in range(index, self._num_validation))

    def close(self) -> None:
        """Stop the actor."""
        ray.kill(self.actor)


class _Ahead:
    """Calls in flight, by their arguments; takes the results in whatever order they are asked for.

    A call that the actor is no longer, or not yet, there to answer is made to its stand-in, which answers the same.
    """

    def __init__(self, actor: Any, method: str, stand_in: "_DataActor", depth: int) -> None:
        self._actor, self._depth = actor, depth
        self._method = getattr(actor, method)
        self._stand_in: Callable[..., Batch] = getattr(stand_in, method)
        self._in_flight: dict[tuple[int, ...], Any] = {}
        self._patience_s = PATIENCE_S

    def take(self, order: Iterable[tuple[int, ...]]) -> Batch:
        """The result for the first of `order`, once those expected after it are in flight too."""
        wanted: Sequence[tuple[int, ...]] = list(islice(order, self._depth + 1))
        self._in_flight = {key: self._in_flight.get(key) or self._method.remote(*key) for key in wanted}
        try:
            batch = self._answer(self._in_flight.pop(wanted[0]))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        if batch is None:
            return self._stand_in(*wanted[0])
        # NOTE: what comes out of Ray's store is read-only and keeps its place there occupied.
        return Batch(np.array(batch.inputs), np.array(batch.targets), np.array(batch.lengths), batch.global_count)

    def _answer(self, answer: Any) -> Batch | None:
        """What the actor says; None if it is not there to say it."""
        while not ray.wait([answer], timeout=self._patience_s)[0]:
            if not _is_alive(self._actor):
                self._patience_s = 0.0  # nor will it answer the next question, for a while
                return None
            self._patience_s = PATIENCE_S
        try:
            batch: Batch = ray.get(answer)
            return batch
        except RayActorError:
            return None


class _DataActor:
    """What runs in the actor. The task is opened at the first call: there a DataError keeps its type."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self._feeder: LocalFeeder | None = None

    def get(self, step: int, micro: int) -> Batch:
        return self._open().get(step, micro)

    def validation(self, index: int) -> Batch:
        return self._open().validation(index)

    def _open(self) -> LocalFeeder:
        self._feeder = self._feeder or LocalFeeder(self._config, self._rank, self._world_size)
        return self._feeder


def _is_alive(actor: Any) -> bool:
    """Whether the actor's process runs, as far as Ray knows."""
    return bool(ray._private.state.actors(actor._actor_id.hex())["State"] == "ALIVE")


def _placement() -> dict[str, Any]:
    """On the caller's node, beside its reservation; started again as often as it is killed."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
