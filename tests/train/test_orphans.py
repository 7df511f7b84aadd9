"""Ranks are killed once they have begun a checkpoint, or what writes for them is: that checkpoint is made, or the next one."""

import os
import shutil
import signal
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distcond.config import Config
from distcond.data.batch import Batch
from distcond.data.batches import LocalFeeder
from tests.helpers import folder_of, run_ranks, sealers_below, small_config, train_run
from tests.train.test_faults import digests

pytestmark = pytest.mark.thorough

LARGE = {
    "cluster__num_workers": 2,
    "model__width": 1024,
    "train__max_steps": 6,
    "train__eval_every": 100,
    "checkpoint__keep_last": 3,
}
"12 MB, which take 0.1 s to be written."
STRIKES_AT = 4
"The step before which it happens; a checkpoint of it has just begun."


class StrikingFeeder(LocalFeeder):
    """Kills some ranks, or what writes for them, as soon as all have begun a checkpoint."""

    victims: Collection[int] = ()
    "Ranks; none: what writes for them."

    def get(self, step: int, micro: int) -> Batch:
        folder = folder_of(self._config)
        if step == STRIKES_AT - 1:
            self._writers = sealers_below(folder.path)  # now, for that takes longer than a checkpoint
        if step == STRIKES_AT:
            dist.barrier()
            (folder.path / f"complete_{self._rank}").write_text(str((folder.checkpoints / "step_00000004").exists()))
            dist.barrier()
            if self._rank in self.victims:
                os.kill(os.getpid(), signal.SIGKILL)
            for process in self._writers if self._rank == 0 and not self.victims else []:
                process.kill()
        return super().get(step, micro)


def train_until_struck(config: Config, victims: Collection[int]) -> list[str]:
    """Train; what this rank told the user."""
    from distcond.train.loop import run_training

    notes: list[str] = []
    feeder = StrikingFeeder(config, dist.get_rank(), config.cluster.num_workers)
    feeder.victims = victims
    run_training(config, folder_of(config), feeder, asdict(config), notes.append)
    return notes


def found_step(config: Config) -> int:
    """The step that a run which is started again goes on from."""
    from distcond.train.state import start_run

    feeder = LocalFeeder(config, dist.get_rank(), config.cluster.num_workers)
    return start_run(config, folder_of(config), feeder, feeder.task).step


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of LARGE to which nothing happens."""
    config = small_config(tmp_path_factory.mktemp("large"), **LARGE)
    train_run(config)
    return folder_of(config).checkpoints


@pytest.mark.parametrize("victims", [{0}, {1}, {0, 1}], ids=str)
def test_a_checkpoint_that_has_begun_is_complete_where_its_ranks_are_killed(
    large: Path, tmp_path: Path, victims: set[int]
) -> None:
    config = small_config(tmp_path, **LARGE)
    with pytest.raises(AssertionError):
        run_ranks(train_until_struck, 2, config, victims)
    assert run_ranks(found_step, 2, config) == [STRIKES_AT] * 2  # it waits
    assert [(tmp_path / f"run/complete_{rank}").read_text() for rank in (0, 1)] == ["False"] * 2
    checkpoints = folder_of(config).checkpoints
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000002", "step_00000004"]
    assert digests(checkpoints / "step_00000004") == digests(large / "step_00000004")
    wait_until_gone(tmp_path)


def wait_until_gone(folder: Path, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while sealers_below(folder):
        assert time.monotonic() < end
        time.sleep(0.05)


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
    wait_until_gone(tmp_path)


def begin_on_rank_0_alone(config: Config) -> None:
    """Kill rank 1 before it has given its part of a checkpoint away, but after rank 0 has; then rank 0."""
    from distcond.train.hooks import CheckpointHook
    from distcond.train.state import start_run

    feeder = LocalFeeder(config, dist.get_rank(), config.cluster.num_workers)
    run = start_run(config, folder_of(config), feeder, feeder.task)

    def die(order: dict[str, Any]) -> None:
        while not list(run.writer.folder.glob(".step_*.tmp")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        run.writer._sealer.give = die
    run.step = STRIKES_AT
    CheckpointHook()._begin(run)
    time.sleep(60)


def test_a_checkpoint_that_not_all_ranks_have_begun_is_given_up(large: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, **LARGE)
    checkpoints = folder_of(config).checkpoints
    shutil.copytree(large / "step_00000002", checkpoints / "step_00000002")
    with pytest.raises(AssertionError):
        run_ranks(begin_on_rank_0_alone, 2, config)
    assert sealers_below(tmp_path)
    start = time.monotonic()
    assert run_ranks(found_step, 2, config) == [2, 2]
    assert 3 < time.monotonic() - start < 10
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    wait_until_gone(tmp_path)
