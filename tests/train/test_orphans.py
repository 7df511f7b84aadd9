"""Ranks are killed once they have begun a checkpoint, or what writes for them is: that checkpoint is made, or the next one."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from distcond.config import Config
from distcond.data.batch import Batch
from distcond.data.batches import LocalFeeder
from distcond.train.sealing import BEGIN_S, FINISH_S, SEAL
from tests.cluster.processes import wait_until
from tests.helpers import HANG_S, folder_of, run_ranks, sealers_below, small_config, train_run
from tests.train.test_faults import digests

pytestmark = pytest.mark.thorough

LARGE = {
    "cluster__num_workers": 2,
    "model__width": 1024,
    "train__max_steps": 6,
    "train__eval_every": 100,
    "checkpoint__keep_last": 3,
}
"12 MB."
STRIKES_AT = 4
"The step before which it happens; a checkpoint of it has begun."
BEGUN = f".step_{STRIKES_AT:08d}."
"How the name of its folder begins."


class StrikingFeeder(LocalFeeder):
    """Kills some ranks, or what writes for them, as soon as all have begun a checkpoint."""

    victims: Collection[int] = ()
    "Ranks; none: what writes for them."

    def get(self, step: int, micro: int) -> Batch:
        folder = folder_of(self._config)
        if step == STRIKES_AT:
            while not list(folder.checkpoints.glob(f"{BEGUN}*/*{SEAL}")):  # of rank 1, for what writes for rank 0 is asleep
                time.sleep(0.001)
            (folder.path / f"complete_{self._rank}").write_text(str((folder.checkpoints / "step_00000004").exists()))
            dist.barrier()
            if self._rank in self.victims:
                os.kill(os.getpid(), signal.SIGKILL)
            for process in sealers_below(folder.path) if self._rank == 0 and not self.victims else []:
                process.kill()
        return super().get(step, micro)


def put_to_sleep(checkpoints: Path) -> None:
    """Suspend what writes for this rank as it is given the checkpoint that has begun when it happens."""
    from distcond.train.sealer import Sealer

    give = Sealer.give

    def give_asleep(self: Sealer, order: dict[str, Any]) -> None:
        if Path(order["folder"]).name.startswith(BEGUN):
            assert self._process is not None
            (own,) = (each for each in sealers_below(checkpoints) if os.getsid(each.pid) == self._process.pid)
            own.suspend()
        give(self, order)

    Sealer.give = give_asleep  # type: ignore[method-assign]


def train_until_struck(config: Config, victims: Collection[int]) -> list[str]:
    """Train; what this rank told the user. The checkpoint that has begun cannot be complete: rank 0's part is not written."""
    from distcond.train.loop import run_training

    if dist.get_rank() == 0:
        put_to_sleep(folder_of(config).checkpoints)
    notes: list[str] = []
    feeder = StrikingFeeder(config, dist.get_rank(), config.cluster.num_workers)
    feeder.victims = victims
    run_training(config, folder_of(config), feeder, asdict(config), notes.append)
    return notes


def found_step(config: Config, asleep: int | None = None) -> int:
    """The step that a run which is started again goes on from; a process that is asleep is woken once it has been waited for."""
    from distcond.train.state import start_run

    feeder = LocalFeeder(config, dist.get_rank(), config.cluster.num_workers)
    if asleep is not None and dist.get_rank() == 0:
        threading.Timer(1.0, os.kill, (asleep, signal.SIGCONT)).start()
    return start_run(config, folder_of(config), feeder, feeder.task).step


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of LARGE to which nothing happens."""
    config = small_config(tmp_path_factory.mktemp("large"), **LARGE)
    train_run(config)
    return folder_of(config).checkpoints


@pytest.fixture(autouse=True)
def none_is_left_asleep(tmp_path: Path) -> Iterator[None]:
    yield
    for process in sealers_below(tmp_path):
        process.kill()


@pytest.mark.parametrize("victims", [{0}, {1}, {0, 1}], ids=str)
def test_a_checkpoint_that_has_begun_is_complete_where_its_ranks_are_killed(
    large: Path, tmp_path: Path, victims: set[int]
) -> None:
    config = small_config(tmp_path, **LARGE)
    with pytest.raises(AssertionError):
        run_ranks(train_until_struck, 2, config, victims)
    (asleep,) = (each.pid for each in sealers_below(tmp_path) if each.status() == psutil.STATUS_STOPPED)
    assert run_ranks(found_step, 2, config, asleep) == [STRIKES_AT] * 2  # it waits
    assert [(tmp_path / f"run/complete_{rank}").read_text() for rank in (0, 1)] == ["False"] * 2
    checkpoints = folder_of(config).checkpoints
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000002", "step_00000004"]
    assert digests(checkpoints / "step_00000004") == digests(large / "step_00000004")
    wait_until(lambda: not sealers_below(tmp_path))


def test_a_kill_of_the_process_that_writes_is_told_and_made_good(large: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, **LARGE)
    told, silent = run_ranks(train_until_struck, 2, config, ())
    assert (tmp_path / "run/complete_0").read_text() == "False"
    reason = "the process that was writing it has ended"
    assert told[0] == f"The checkpoint of step {STRIKES_AT} could not be written: {reason}. It will be tried again."
    assert told[1:] == ["The checkpoint of step 6 is written."] and silent == []
    checkpoints = folder_of(config).checkpoints
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000002", "step_00000006"]  # not 4
    assert digests(checkpoints / "step_00000006") == digests(large / "step_00000006")
    wait_until(lambda: not sealers_below(tmp_path))


def begin_on_rank_0_alone(config: Config) -> None:
    """Kill rank 1 before it has given its part of a checkpoint away, but after rank 0 has; then rank 0."""
    from distcond.train.hooks import CheckpointHook
    from distcond.train.state import start_run

    feeder = LocalFeeder(config, dist.get_rank(), config.cluster.num_workers)
    run = start_run(config, folder_of(config), feeder, feeder.task)

    def die(order: dict[str, Any]) -> None:
        while not list(run.writer.folder.glob(".step_*.tmp")):
            time.sleep(0.001)
        (folder_of(config).path / "died_at").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        run.writer._sealer.give = die
    run.step = STRIKES_AT
    CheckpointHook()._begin(run)
    time.sleep(HANG_S)


def test_a_checkpoint_that_not_all_ranks_have_begun_is_given_up(large: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, **LARGE)
    checkpoints = folder_of(config).checkpoints
    shutil.copytree(large / "step_00000002", checkpoints / "step_00000002")
    with pytest.raises(AssertionError):
        run_ranks(begin_on_rank_0_alone, 2, config)
    assert sealers_below(tmp_path)
    assert run_ranks(found_step, 2, config) == [2, 2]
    assert BEGIN_S < time.monotonic() - float((tmp_path / "run/died_at").read_text()) < FINISH_S - 20
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    wait_until(lambda: not sealers_below(tmp_path))
