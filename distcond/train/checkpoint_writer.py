"""Checkpoints beside training: a copy of the state in memory, which a process of each rank then writes to its files.

A step waits for the copy alone, about a tenth of the time that writing, sha256 and fsync take. From then on the checkpoint
comes to be even if the ranks are killed. Rank 0's process publishes it once the files of all ranks are sealed. What fails (a
full disk, storage that is gone) is told and tried again; training goes on. Ranks agree on what has become of a checkpoint in
`agree`, once a step.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from distcond.config import CheckpointConfig
from distcond.finite import finite
from distcond.optim.sharded import ShardedRows
from distcond.table import Collective
from distcond.train.checkpoint import DENSE, FORMAT_VERSION
from distcond.train.sealer import Sealer
from distcond.train.sealing import explained, make_folders, write_sealed
from distcond.train.snapshot import Snapshot, file_pieces
from distcond.train.table_files import table_names

log = logging.getLogger(__name__)

MEMORY_SHARE = 4
"A state is copied where so many times its size is available in memory, for other ranks may copy theirs; else training waits."
FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 300.0
"From a checkpoint that could not be written to the next attempt; doubled each time."
POLL_S = 0.005
LONGEST_LINE = 1000
"Of what a rank tells the others, in bytes."


@dataclass(kw_only=True)
class _Attempt:
    """One checkpoint on its way to the disk, as one rank sees it."""

    step: int
    num_bytes: int
    stall_s: float = 0.0
    write_s: float = 0.0
    is_done: bool = False
    is_cancelled: bool = False
    error: str = ""

    def end(self, error: str, write_s: float) -> None:
        """error: empty where there was none."""
        self.is_done, self.error, self.write_s = True, error, write_s


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. What is called `Collective` every rank has to call.

    note: told what a user should know, on rank 0.
    """

    def __init__(self, folder: Path, tables: ShardedRows, config: CheckpointConfig, note: Callable[[str], None]) -> None:
        self.folder, self._config, self._note = folder, config, note
        self._tables, self._world = tables, tables.world
        self._snapshot = Snapshot()
        self._sealer = Sealer(folder, self._snapshot.descriptor)
        with contextlib.suppress(OSError):  # of storage that is gone; tried again when there is something to write
            self._sealer.start()
        self._attempt: _Attempt | None = None
        self._num_failures, self._retry_at = 0, float("inf")
        self.retry_is_due = False
        "Whether a checkpoint that could not be written should be tried again now, from the state as it is; all ranks agree."
        self.failure = ""
        "Why the last attempt failed; empty where it did not. All ranks agree."
        self.newest: int | None = None
        "The step of the last checkpoint that was written. All ranks agree."
        self.last: _Attempt | None = None
        "The last attempt that has ended, for its times."

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written; all ranks agree."""
        return self._attempt is not None

    def begin(
        self, step: int, dense: Mapping[str, Tensor], tables: dict[str, dict[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Copy the state after `step` updates, then write it beside training. Collective; nothing may be being written.

        dense: full tensors by name, of which rank 0's are kept. tables: this rank's, from `own_tables`.
        """
        assert not self.is_busy
        start, rank = time.perf_counter(), self._world.rank
        unique = int(self._world.broadcast_(torch.tensor([time.time_ns()])))
        folder = self.folder / f".{name_of(step)}.{unique}.tmp"  # until it is complete; another one for every attempt
        files = {**({DENSE: dict(dense)} if rank == 0 else {}), **tables}
        num_bytes = sum(value.nbytes for tensors in files.values() for value in tensors.values())
        attempt = self._attempt = _Attempt(step=step, num_bytes=num_bytes)
        self._retry_at = float("inf")
        needs = f"{num_bytes:,} bytes of rank {rank}"
        publication = None if rank else self._publication(step, state)
        try:
            if MEMORY_SHARE * num_bytes <= psutil.virtual_memory().available:
                places = self._snapshot.take(files)
            else:
                places = []
                make_folders(folder)
                for name, tensors in files.items():
                    write_sealed(folder, name, file_pieces(tensors))
            self._sealer.give({"folder": str(folder), "files": places, "needs": needs, "publication": publication})
        except OSError as error:
            attempt.end(explained(error, folder, needs), time.perf_counter() - start)
        attempt.stall_s = time.perf_counter() - start

    def agree(self, asked: bool = False) -> bool:
        """Whether any rank was asked, which has nothing to do with checkpoints; and take note of one that has ended. Collective.

        All that the ranks have to agree on once a step is in this one reduction.
        """
        self._look()
        attempt, world = self._attempt, self._world
        has_ended = attempt is None or attempt.is_done
        has_failed = attempt is not None and bool(attempt.error)
        flags = [asked, not has_ended, has_failed, time.monotonic() >= self._retry_at]
        any_asked, is_busy, any_failed, self.retry_is_due = world.max_(torch.tensor(flags, dtype=torch.float32)).bool().tolist()
        if attempt is not None and any_failed and not (has_ended or attempt.is_cancelled):
            attempt.is_cancelled = True
            self._sealer.cancel()
        if attempt is not None and not is_busy:
            self._conclude(attempt, any_failed)
        return bool(any_asked)

    def settle(self, timeout_s: float) -> bool:
        """Wait for the checkpoint that is being written, if there is one; whether it ended in time. Collective."""
        end = time.monotonic() + timeout_s
        while self.is_busy:
            if self.agree(self._world.rank == 0 and time.monotonic() > end):
                return not self.is_busy
            self._look(POLL_S)
        return True

    def close(self) -> None:
        """Let go of the process, which finishes what it has been given. Nothing can be begun any more."""
        self._sealer.close()
        self._snapshot.close()

    def _publication(self, step: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """What rank 0's process has to know beside the files."""
        return {
            "name": name_of(step),
            "files": [DENSE, *table_names(self._tables)],
            "state": json.dumps(finite({"format_version": FORMAT_VERSION, "step": step, **state}), indent=2) + "\n",
            "keep_last": self._config.keep_last,
            "keep_best": self._config.keep_best,
        }

    def _look(self, timeout_s: float = 0.0) -> None:
        """Take note of what the process has to say."""
        attempt = self._attempt
        if attempt is not None and not attempt.is_done and (answer := self._sealer.answer(timeout_s)) is not None:
            attempt.end(answer["error"], attempt.stall_s + answer["seconds"])

    def _conclude(self, attempt: _Attempt, has_failed: bool) -> None:
        """The same on all ranks."""
        self._attempt, self.last = None, attempt
        self.failure = lowest_line(self._world, attempt.error) if has_failed else ""
        if has_failed:
            wait_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2**self._num_failures)
            self._num_failures += 1
            self._retry_at = time.monotonic() + wait_s if self._world.rank == 0 else float("inf")
            self._tell(f"The checkpoint of step {attempt.step} could not be written: {self.failure}. It will be tried again.")
        else:
            if self._num_failures:
                self._tell(f"The checkpoint of step {attempt.step} is written.")
            self._num_failures, self.newest = 0, attempt.step
            times = f"stalled {attempt.stall_s:.3f} s, written in {attempt.write_s:.3f} s"
            log.info("Checkpoint of step %d: %d bytes of this rank, %s.", attempt.step, attempt.num_bytes, times)

    def _tell(self, line: str) -> None:
        if self._world.rank == 0:
            self._note(line)


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def lowest_line(world: Collective, line: str) -> str:
    """On every rank the line of the lowest rank that has one; cut to LONGEST_LINE bytes. Collective."""
    first = world.size - int(world.max_(torch.tensor([float(world.size - world.rank if line else 0)])))
    letters = torch.zeros(LONGEST_LINE, dtype=torch.int64)
    if world.rank == first:
        own = line.encode()[:LONGEST_LINE]
        letters[: len(own)] = torch.tensor(list(own))
    return bytes(world.sum_(letters).tolist()).rstrip(b"\0").decode(errors="ignore")
