"""Steps without a finite loss or gradient: left out, then back to a checkpoint once, then the end with the tensor's name."""

import gc
import json
import math
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distcond.config import Config
from distcond.data.batch import Batch
from distcond.data.batches import LocalFeeder
from distcond.errors import TrainingError
from distcond.train.state import Run
from tests.helpers import HANG_S, folder_of, run_ranks, small_config, text_config, train_run

pytestmark = pytest.mark.thorough

FROM = 5
RHYTHM = {
    "train__max_steps": 12,
    "train__eval_every": 12,
    "train__max_bad_steps": 3,
    "checkpoint__every": 4,
    "cluster__num_workers": 2,
}


class BadFeeder(LocalFeeder):
    """From one step on, a number of rank 1's second micro-batch is none that anybody can use."""

    def get(self, step: int, micro: int) -> Batch:
        batch = super().get(step, micro)
        if step >= FROM and micro == 1 and self._rank == 1:
            batch.inputs[0, 0, 0] = math.nan
        return batch


class OnceBadFeeder(LocalFeeder):
    """As a memory that is at fault for a while: the second time, all is well."""

    num_bad = 0

    def get(self, step: int, micro: int) -> Batch:
        batch = super().get(step, micro)
        if FROM <= step < FROM + 3 and self._rank == 1 and self.num_bad < 3:
            self.num_bad += 1
            batch.inputs[0, 0, 0] = math.inf
        return batch


def outcome(config: Config, feeder_class: type[LocalFeeder], change: Any = None) -> tuple[list[str], str]:
    """Train; what the user was told meanwhile, and what the run failed with."""
    from distcond.train import loop

    if change is not None:
        change()
    notes: list[str] = []
    feeder = feeder_class(config, dist.get_rank(), config.cluster.num_workers)
    try:
        loop.run_training(config, folder_of(config), feeder, asdict(config), notes.append)
    except TrainingError as error:
        return notes, str(error)
    return notes, ""


def steps_of(config: Config) -> list[int]:
    lines = (folder_of(config).path / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if "train/loss" in row]


BACK = "No finite loss or gradient in 3 steps up to 7: going back to the last checkpoint."


@pytest.mark.parametrize("stage", [1, 3])
def test_bad_steps_in_a_row_end_a_run_that_has_gone_back_once_with_the_name_of_the_tensor(tmp_path: Path, stage: int) -> None:
    config = small_config(tmp_path, **RHYTHM, optim__accumulation=2, optim__zero_stage=stage)
    (told, error), (silent, same) = run_ranks(outcome, 2, config, BadFeeder)
    assert (told, silent) == ([BACK], [])
    assert error == same
    where = "not finite first, in batch 7: the input (micro-batch 1 of rank 1)."
    assert error == f"no finite loss or gradient in steps 5 to 7; {where} Lower optim.lr, or look at that batch."
    assert steps_of(config) == [1, 2, 3, 4, 5, 6, 7]
    checkpoints = folder_of(config).checkpoints
    assert (checkpoints / "latest").read_text() == "step_00000004\n"


def test_a_fault_that_passes_changes_nothing(tmp_path: Path) -> None:
    config = small_config(tmp_path / "faulty", **RHYTHM)
    assert run_ranks(outcome, 2, config, OnceBadFeeder) == [([BACK], ""), ([], "")]
    straight = small_config(tmp_path / "straight", **RHYTHM)
    train_run(straight)
    manifests = [folder_of(run).checkpoints / "step_00000012/manifest.json" for run in (config, straight)]
    assert manifests[0].read_text() == manifests[1].read_text()
    assert steps_of(config) == list(range(1, 13))


def memory(config: Config) -> tuple[list[int], list[int]]:
    """Bytes that tensors hold before and after each start of a run that goes back once."""
    from distcond.train import loop

    before: list[int] = []
    after: list[int] = []
    start_run = loop.start_run

    def watched(*args: Any) -> Run:
        deadline = time.monotonic() + HANG_S / 4
        while (held := bytes_of_tensors()) > (before[0] if before else 0) and time.monotonic() < deadline:
            time.sleep(0.01)  # Gloo's threads let go of what they have summed only after they have told that it is there
        before.append(held)
        run = start_run(*args)
        after.append(bytes_of_tensors())
        return run

    loop.start_run = watched
    feeder = OnceBadFeeder(config, dist.get_rank(), config.cluster.num_workers)
    loop.run_training(config, folder_of(config), feeder, asdict(config), lambda _: None)
    return before, after


def bytes_of_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings(action="ignore"):  # objects that are asked for their class may say that they are old
        storages = [thing.untyped_storage() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_run_leaves_when_it_goes_back_takes_no_memory(tmp_path: Path, stage: int) -> None:
    config = small_config(tmp_path, **RHYTHM, model__width=256, optim__zero_stage=stage)
    for before, after in run_ranks(memory, 2, config):
        assert len(before) == 2
        assert before[1] == before[0] < after[0] < after[1]


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    config = small_config(tmp_path, **{**RHYTHM, "checkpoint__every": 100}, optim__accumulation=2)
    told, error = run_ranks(outcome, 2, config, BadFeeder)[0]
    assert told == []
    assert "not finite first, in batch 7: the input (micro-batch 1 of rank 1)" in error


def overflowing_output() -> None:
    """A layer whose output is too large for its precision."""
    from distcond.nn.transformer import Block

    forward = Block.forward
    Block.forward = lambda self, *args, **options: _scaled(forward(self, *args, **options))


def _scaled(state: Any) -> Any:
    return state * 3e38 if isinstance(state, torch.Tensor) else tuple(map(_scaled, state))


def bad_gradient() -> None:
    """A layer whose output is finite and whose gradient is not."""
    from distcond.nn.transformer import Block

    forward = Block.forward

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        state = forward(self, *args, **options)
        return state + (state - state.detach()).abs().sqrt().sum() * 1.0

    Block.forward = broken


@pytest.mark.parametrize(
    ("change", "found"),
    [(overflowing_output, "the output of "), (bad_gradient, "the gradient at the output of ")],
)
def test_the_module_that_went_bad_is_named(tmp_path: Path, change: Any, found: str) -> None:
    rhythm = {**RHYTHM, "cluster__num_workers": 1, "checkpoint__every": 100}
    ((_, error),) = run_ranks(outcome, 1, text_config(tmp_path, **rhythm), LocalFeeder, change)
    assert f"in batch 2: {found}" in error
    assert "(micro-batch 0 of rank 0)" in error
