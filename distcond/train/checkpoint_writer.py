"""Checkpoints beside training: a copy of the state in memory, which a thread of each rank then writes to its files.

A step waits for the copy alone, about a tenth of the time that writing, sha256 and fsync take. Rank 0 publishes a checkpoint
once the files of all ranks are sealed. What fails (a full disk, storage that is gone) is told and tried again; training
goes on. Threads make no collective calls: ranks agree on what has become of a checkpoint in `agree`, once a step.
"""

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from distcond.config import CheckpointConfig
from distcond.errors import RunError
from distcond.optim.sharded import ShardedRows
from distcond.table import Collective
from distcond.train.checkpoint import DENSE, FORMAT_VERSION, SEAL, STATE, prune, publish, write_sealed
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
    folder: Path
    "Where its files are until it is complete; another one for every attempt."
    files: dict[str, dict[str, Tensor]]
    "This rank's."
    names: list[str]
    "The files of all ranks."
    state: str
    "The content of state.json."
    num_bytes: int
    started: float = field(default_factory=time.perf_counter)
    stall_s: float = 0.0
    write_s: float = 0.0
    is_done: threading.Event = field(default_factory=threading.Event)
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. What is called `Collective` every rank has to call.

    note: told what a user should know, on rank 0.
    """

    def __init__(self, folder: Path, tables: ShardedRows, config: CheckpointConfig, note: Callable[[str], None]) -> None:
        self.folder, self._config, self._note = folder, config, note
        self._tables, self._world = tables, tables.world
        self._shelf = _Shelf()
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
        start = time.perf_counter()
        unique = int(self._world.broadcast_(torch.tensor([time.time_ns()])))
        files = {**({DENSE: dict(dense)} if self._world.rank == 0 else {}), **tables}
        num_bytes = sum(value.nbytes for tensors in files.values() for value in tensors.values())
        attempt = _Attempt(
            step=step,
            folder=self.folder / f".{name_of(step)}.{unique}.tmp",
            files=files,
            names=[DENSE, *table_names(self._tables)],
            state=json.dumps({"format_version": FORMAT_VERSION, "step": step, **state}, indent=2) + "\n",
            num_bytes=num_bytes,
        )
        fits = MEMORY_SHARE * num_bytes <= psutil.virtual_memory().available
        if fits:
            attempt.files = {name: self._shelf.copies(name, tensors) for name, tensors in files.items()}
        self._retry_at = float("inf")
        thread = threading.Thread(target=self._run, args=(attempt,), name="checkpoint", daemon=True)
        self._attempt = attempt
        if not fits:
            self._write_own(attempt)
        attempt.stall_s = time.perf_counter() - start
        thread.start()

    def agree(self, asked: bool = False) -> bool:
        """Whether any rank was asked, which has nothing to do with checkpoints; and take note of one that has ended. Collective.

        All that the ranks have to agree on once a step is in this one reduction.
        """
        attempt, world = self._attempt, self._world
        has_ended = attempt is None or attempt.is_done.is_set()
        has_failed = attempt is not None and attempt.error is not None
        flags = [asked, not has_ended, has_failed, time.monotonic() >= self._retry_at]
        any_asked, is_busy, any_failed, self.retry_is_due = world.max_(torch.tensor(flags, dtype=torch.float32)).bool().tolist()
        if attempt is not None and any_failed:
            attempt.is_cancelled.set()
        if attempt is not None and has_ended and not isinstance(attempt.error, OSError | None):
            raise attempt.error
        if attempt is not None and not is_busy:
            self._conclude(attempt, any_failed)
        return bool(any_asked)

    def settle(self, timeout_s: float) -> bool:
        """Wait for the checkpoint that is being written, if there is one; whether it ended in time. Collective."""
        end = time.monotonic() + timeout_s
        while self.is_busy:
            if self.agree(self._world.rank == 0 and time.monotonic() > end):
                return not self.is_busy
            if self._attempt is not None:
                self._attempt.is_done.wait(POLL_S)
        return True

    def _conclude(self, attempt: _Attempt, has_failed: bool) -> None:
        """The same on all ranks."""
        self._attempt, self.last = None, attempt
        why = str(attempt.error) if attempt.error is not None else ""
        self.failure = lowest_line(self._world, why) if has_failed else ""
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

    # ---- in the thread -----------------------------------------------------------------------------------------------

    def _run(self, attempt: _Attempt) -> None:
        try:
            if attempt.error is None:
                self._write_own(attempt)
            if attempt.error is None and self._world.rank == 0:
                self._publish(attempt)
        except Exception as error:  # noqa: BLE001 - raised again where training waits for it
            attempt.error = error
        attempt.write_s = time.perf_counter() - attempt.started
        attempt.is_done.set()

    def _write_own(self, attempt: _Attempt) -> None:
        try:
            # NOTE: no parents, for storage that is gone must not be made anew where it was mounted.
            for folder in (self.folder, attempt.folder):
                folder.mkdir(exist_ok=True)
            while attempt.files:
                name, tensors = attempt.files.popitem()
                write_sealed(attempt.folder, name, tensors)
        except OSError as error:
            attempt.error = self._explained(error, attempt)

    def _publish(self, attempt: _Attempt) -> None:
        for left in self.folder.glob(".step_*"):  # by a process that was killed
            if left != attempt.folder:
                shutil.rmtree(left, ignore_errors=True)
        try:
            (attempt.folder / STATE).write_text(attempt.state)
            while not all((attempt.folder / f"{name}{SEAL}").exists() for name in attempt.names):
                if attempt.is_cancelled.wait(POLL_S):
                    return
            publish(attempt.folder, self.folder / name_of(attempt.step))
        except OSError as error:
            attempt.error = self._explained(error, attempt)
        finally:
            shutil.rmtree(attempt.folder, ignore_errors=True)  # where it has not become a checkpoint
        with contextlib.suppress(OSError, RunError):  # what is left over is removed the next time
            prune(self.folder, self._config.keep_last, self._config.keep_best)

    def _explained(self, error: OSError, attempt: _Attempt) -> OSError:
        """The error with what is needed and what there is."""
        try:
            free = f"{shutil.disk_usage(self.folder.parent).free:,} bytes are free"
        except OSError:
            free = f"{self.folder.parent} is not there"
        reason = error.strerror or str(error)
        return OSError(f"{reason}; it takes {attempt.num_bytes:,} bytes of rank {self._world.rank}, {free} in {self.folder}")


class _Shelf:
    """Memory that copies of tensors are put into, kept from one checkpoint to the next: fresh memory takes four times as long."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    def copies(self, place: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors, valid until the next call for this place."""
        kept = {(place, name): self._memory.pop((place, name), None) for name in tensors}
        self._memory = {key: memory for key, memory in self._memory.items() if key[0] != place}
        copies = {}
        for name, tensor in tensors.items():
            memory = kept[place, name]
            if memory is None or not tensor.nbytes <= len(memory) <= 2 * tensor.nbytes + 64:
                memory = torch.empty(tensor.nbytes + tensor.nbytes // 8, dtype=torch.uint8)  # rows of a table grow
            self._memory[place, name] = memory
            copies[name] = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor)
        return copies


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
