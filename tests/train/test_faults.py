"""Storage that fails and processes that are killed while checkpoints are written: nothing is lost, and nothing is half."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist

from distcond.config import Config
from distcond.data.batch import Batch
from distcond.data.batches import LocalFeeder
from distcond.train.checkpoint import newest_checkpoint, verified
from distcond.train.sealer import wait_for_orphans
from tests.helpers import HANG_S, changed, folder_of, metric_rows, run_ranks, small_config, train_here, train_run

pytestmark = pytest.mark.thorough

FAILS_AT, WORKS_AT, LAST = 3, 9, 12
RHYTHM = {"train__max_steps": LAST, "train__eval_every": LAST, "checkpoint__every": 2, "cluster__num_workers": 2}


def digests(checkpoint: Path) -> dict[str, str]:
    manifest = json.loads((verified(checkpoint) / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config(tmp_path_factory.mktemp("undisturbed"), **RHYTHM)
    train_run(config)
    return folder_of(config).path


# ---- storage that fails ------------------------------------------------------------------------------------------------


class FaultyFeeder(LocalFeeder):
    """Lets the storage fail while one step is being trained, and work again at a later one."""

    pause_s = 0.0
    "What every step in between takes longer."

    def get(self, step: int, micro: int) -> Batch:
        if self._rank == 0 and micro == 0:
            time.sleep(self.pause_s if FAILS_AT < step <= WORKS_AT else 0)
            folder = folder_of_fault(self._config)
            if step == FAILS_AT:
                FAULTS[self._config.run.name](folder, True)
            if step == WORKS_AT:
                FAULTS[self._config.run.name](folder, False)
        return super().get(step, micro)


def wait_for_first_checkpoint() -> None:
    """Let this rank train on only once what writes the first checkpoint has nothing left to do."""
    from distcond.train.hooks import CheckpointHook
    from distcond.train.state import Run

    begin = CheckpointHook._begin

    def begin_and_wait(self: CheckpointHook, run: Run) -> None:
        begin(self, run)
        assert run.step > FAILS_AT or run.writer.settle(HANG_S)

    CheckpointHook._begin = begin_and_wait  # type: ignore[method-assign]


def folder_of_fault(config: Config) -> Path:
    return Path(config.run.dir)


def fill(disk: Path, fails: bool) -> None:
    """A disk without a byte free."""
    if not fails:
        return (disk / "filler").unlink()
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))


def write_protect(disk: Path, fails: bool) -> None:
    command = ["mount", "-o", f"remount,{'ro' if fails else 'rw'}", str(disk)]
    while subprocess.run(command, capture_output=True).returncode:  # busy as long as a file is being written
        time.sleep(0.01)


def take_away(disk: Path, fails: bool) -> None:
    """A mount that is not there: its folder is, and empty."""
    place, elsewhere = disk / "gone", disk / "elsewhere"
    (place.rename(elsewhere) if fails else elsewhere.rename(place))


FAULTS = {"full": fill, "protected": write_protect, "gone": take_away}
SAYS = {"full": "No space left on device", "protected": "Read-only file system", "gone": "No such file or directory"}


def notes_of(config: Config, pause_s: float) -> list[str]:
    """Train on failing storage; what this rank told the user."""
    from distcond.train.loop import run_training

    notes: list[str] = []
    feeder = FaultyFeeder(config, dist.get_rank(), config.cluster.num_workers)
    feeder.pause_s = pause_s
    wait_for_first_checkpoint()
    run_training(config, folder_of(config), feeder, asdict(config), notes.append)
    return notes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


A_MINUTE = [pytest.param(fault, 60.0, marks=pytest.mark.slow, id=f"{fault}-60s") for fault in FAULTS]


@pytest.mark.parametrize(("fault", "for_s"), [*((fault, 0.0) for fault in FAULTS), *A_MINUTE])
def test_training_goes_on_while_the_storage_fails(undisturbed: Path, disk: Path, fault: str, for_s: float) -> None:
    config = small_config(disk, run__name=fault, **RHYTHM)
    start = time.monotonic()
    told, silent = run_ranks(notes_of, 2, config, for_s / (WORKS_AT - FAILS_AT))
    assert time.monotonic() - start > for_s
    assert silent == []
    failed, *_, written = told
    assert failed.startswith(f"The checkpoint of step 4 could not be written: {SAYS[fault]}")
    assert ("; it takes " in failed) and ("bytes are free" in failed or "is not there" in failed)
    assert failed.endswith("It will be tried again.")
    assert written in {f"The checkpoint of step {step} is written." for step in (8, 9, 10)}  # 8, or 9 once more: as it came back
    run = folder_of(config).path
    assert digests(run / "checkpoints/step_00000012") == digests(undisturbed / "checkpoints/step_00000012")
    assert metric_rows(run) == metric_rows(undisturbed)  # rows that the disk did not take came later
    assert newest_checkpoint(run / "checkpoints") == (run / "checkpoints/step_00000012", {})


class FillingFeeder(LocalFeeder):
    def get(self, step: int, micro: int) -> Batch:
        if step == FAILS_AT and self._rank == 0:
            fill(folder_of_fault(self._config), True)
        return super().get(step, micro)


def error_at_the_end(config: Config) -> str:
    """Train on a disk that stays full; what the run ends with."""
    from distcond.errors import TrainingError
    from distcond.train import hooks

    hooks.LAST_LIMIT_S = 2.0
    wait_for_first_checkpoint()
    try:
        train_here(config, FillingFeeder)
    except TrainingError as error:
        return str(error)
    return ""


def test_a_run_fails_only_where_its_last_checkpoint_cannot_be_written(disk: Path) -> None:
    config = small_config(disk, run__name="full", **RHYTHM)
    lines = run_ranks(error_at_the_end, 2, config)
    assert lines[0] == lines[1] and "\n" not in lines[0]
    assert lines[0].startswith("the last checkpoint, of step 12, could not be written: No space left on device; it takes ")
    assert digests(folder_of(config).checkpoints / "step_00000002")


# ---- kills while checkpoints are written -------------------------------------------------------------------------------

EVERY_STEP = {"checkpoint__every": 1, "train__log_every": 1000, "train__eval_every": 1000, "model__width": 256}


KILLER = """
import contextlib, os, psutil, signal, sys, time
from pathlib import Path

checkpoints, delay_s, ranks = Path(sys.argv[1]), float(sys.argv[2]), [int(pid) for pid in sys.argv[3:]]
before = set(checkpoints.glob(".step_*.tmp"))
while set(checkpoints.glob(".step_*.tmp")) <= before:
    pass
time.sleep(delay_s)
writers = [each.pid for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [])[-1:] == [sys.argv[1]]]
for pid in [*ranks, *writers]:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
"""


def train_to_be_killed(config: Config, delay_s: float) -> None:
    """Train until a killer strikes all ranks and what writes for them, some time after it saw a checkpoint begin."""
    folder, rank = folder_of(config), dist.get_rank()
    (folder.path / f"pid_{rank}").write_text(str(os.getpid()))
    dist.barrier()
    if rank == 0:
        pids = [(folder.path / f"pid_{other}").read_text() for other in range(dist.get_world_size())]
        command = [sys.executable, "-c", KILLER, str(folder.checkpoints), str(delay_s), *pids]
        subprocess.Popen(command, start_new_session=True)
    train_here(config)


def interrupt_often(config: Config, times: int, seed: int) -> list[int]:
    """Kill a run so many times while it writes checkpoints; the steps that were there after each."""
    checkpoints, steps = folder_of(config).checkpoints, []
    for delay_s in (random.Random(f"{seed}-{kill}").uniform(0, 0.3) for kill in range(times)):
        with pytest.raises(AssertionError):
            run_ranks(train_to_be_killed, config.cluster.num_workers, config, delay_s)
        wait_for_orphans(checkpoints)  # what was killed may still be there
        newest, refused = newest_checkpoint(checkpoints)
        assert not refused
        steps.append(int(newest.name[5:]) if newest else 0)
    return steps


@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path, times: int) -> None:
    config = small_config(tmp_path, cluster__num_workers=2, train__max_steps=10**6, **EVERY_STEP)
    steps = interrupt_often(config, times, seed=0)
    assert steps == sorted(steps) and steps[-1] > 1
    last = max(steps) + 1
    ended = changed(config, train__max_steps=last)
    train_run(ended)
    straight = changed(ended, run__name="straight")
    train_run(straight)
    name = f"checkpoints/step_{last:08d}"
    assert digests(folder_of(ended).path / name) == digests(folder_of(straight).path / name)
    kept = sorted(path.name for path in folder_of(ended).checkpoints.iterdir())
    assert kept == ["latest", f"step_{last - 1:08d}", f"step_{last:08d}"]  # nothing that was half-written


# ---- what writing costs ------------------------------------------------------------------------------------------------


def costs_of(config: Config) -> tuple[list[float], list[float], int, int]:
    """Seconds that training waited and that writing took, of several checkpoints; bytes on the disk and of the state."""
    from distcond.train.hooks import CheckpointHook
    from distcond.train.state import start_run

    feeder = LocalFeeder(config, 0, 1)
    run = start_run(config, folder_of(config), feeder, feeder.task)
    stalls, writes = [], []
    for _ in range(8):
        CheckpointHook()._begin(run)
        assert run.writer.settle(HANG_S) and run.writer.last is not None
        stalls.append(run.writer.last.stall_s)
        writes.append(run.writer.last.write_s)
    newest, _ = newest_checkpoint(run.writer.folder)
    assert newest is not None
    numbers = sum(parameter.numel() for parameter in run.learner.parameters())
    numbers += sum(store.data.numel() for table in run.engine.tables.optimizer.tables() for _, store in table.stores())
    return stalls[1:], writes[1:], sum(file.stat().st_size for file in newest.iterdir()), 12 * numbers


def test_a_checkpoint_is_as_large_as_its_numbers(tmp_path: Path) -> None:
    (costs,) = run_ranks(costs_of, 1, small_config(tmp_path, cluster__num_workers=1, model__width=128))
    assert costs[2] <= 1.1 * costs[3]


@pytest.mark.slow
def test_a_step_waits_for_a_tenth_of_the_time_that_a_checkpoint_takes(tmp_path: Path) -> None:
    config = small_config(tmp_path, cluster__num_workers=1, model__width=2048, model__tree__depth=0)
    ((stalls, writes, size, _),) = run_ranks(costs_of, 1, config)
    print(f"{size} bytes: stalled {sorted(stalls)[3]:.3f} s, written in {sorted(writes)[3]:.3f} s")
    assert sorted(stalls)[3] <= 0.1 * sorted(writes)[3]
