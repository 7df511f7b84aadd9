"""Which rows of which batch a rank sees.

A global batch is cut into contiguous blocks of micro-batch size: row i belongs to block rank * accumulation + micro.
"""

import math
from typing import Protocol

from distcond.config import Config
from distcond.data.batch import Batch, pad
from distcond.data.tasks import build_task

__all__ = ["Batch", "Feeder", "LocalFeeder", "num_validation_batches"]


class Feeder(Protocol):
    """Hands one rank its batches."""

    def get(self, step: int, micro: int) -> Batch:
        """The rank's rows of micro-batch `micro` of optimiser step `step`."""

    def validation(self, index: int) -> Batch:
        """The rank's rows of validation micro-batch `index`."""


class LocalFeeder:
    """A feeder that computes each batch in this process, when asked; it keeps no position."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self.task = build_task(config.data)
        self._config, self._rank, self._world_size = config, rank, world_size
        self._size = _micro_batch_size(config, world_size)

    def get(self, step: int, micro: int) -> Batch:
        """The rank's rows of micro-batch `micro` of optimiser step `step`."""
        start = (self._rank * self._config.optim.accumulation + micro) * self._size
        part = slice(start, start + self._size)
        return self.task.rows(self._config.seed, step, self._config.data.global_batch_size, part)

    def validation(self, index: int) -> Batch:
        """The rank's rows of validation micro-batch `index`, padded with rows of length 0 where the set ends.

        `global_count` counts the examples of this micro-batch over all ranks, without padding.
        """
        examples, across = self._config.data.validation_examples, self._size * self._world_size
        first = index * across + self._rank * self._size
        start, stop = min(first, examples), min(first + self._size, examples)
        batch = self.task.validation_rows(start, stop - start)
        rows = min(across, examples - index * across)
        batch.global_count = rows * (self.task.max_length if self.task.kind == "bytes" else 1)
        return pad(batch, self._size)


def num_validation_batches(config: Config, world_size: int) -> int:
    """Validation micro-batches, the same on every rank; together they hold each validation example once."""
    return math.ceil(config.data.validation_examples / (_micro_batch_size(config, world_size) * world_size))


def _micro_batch_size(config: Config, world_size: int) -> int:
    """As in config/, for the world there is: `evaluate` opens a run of many ranks with fewer."""
    size, rest = divmod(config.data.global_batch_size, world_size * config.optim.accumulation)
    assert not rest, f"{config.data.global_batch_size} rows do not divide into {world_size} x {config.optim.accumulation}"
    return size
