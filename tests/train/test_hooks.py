"""What stands at the end of a run, whatever was asked of it and however slow or stale its storage is."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from distcond.config import Config
from distcond.data.batch import Batch
from distcond.data.batches import LocalFeeder
from tests.helpers import changed, folder_of, metric_rows, small_config, train_run

pytestmark = pytest.mark.thorough


class StopsAtStep5(LocalFeeder):
    """Somebody asks for a stop while step 5 is being trained."""

    def get(self, step: int, micro: int) -> Batch:
        if step == 4:
            folder_of(self._config).stop_file.touch()
        return super().get(step, micro)


def slow_disk(config: Config, rank: int, size: int) -> LocalFeeder:
    """The first checkpoint takes longer than what waits for it, but is complete in time for the last one."""
    from distcond.train import hooks, sealer

    give, answer = sealer.Sealer.give, sealer.Sealer.answer

    def slow_give(self: sealer.Sealer, order: Any) -> None:
        self.given_at = getattr(self, "given_at", time.monotonic())  # type: ignore[attr-defined]
        give(self, order)

    def slow_answer(self: sealer.Sealer, timeout_s: float = 0.0) -> Any:
        is_early = time.monotonic() - self.given_at < 3.2  # type: ignore[attr-defined]
        return time.sleep(min(timeout_s, 0.01)) if is_early else answer(self, timeout_s)

    sealer.Sealer.give, sealer.Sealer.answer = slow_give, slow_answer  # type: ignore[method-assign]
    hooks.LONGEST_WAIT_S, hooks.STOP_LIMIT_S, hooks.LAST_LIMIT_S = 1.2, 2.0, 60.0
    return StopsAtStep5(config, rank, size) if config.train.max_steps > 5 else LocalFeeder(config, rank, size)


@pytest.mark.parametrize("max_steps", [5, 50])
def test_the_last_state_is_written_even_where_the_one_before_takes_long(tmp_path: Path, max_steps: int) -> None:
    config = small_config(tmp_path, train__max_steps=max_steps, train__eval_every=50, checkpoint__every=4)
    summary = train_run(config, slow_disk)
    assert (summary["step"], summary["stopped"]) == (5, max_steps > 5)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000005\n"
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary


def test_a_stop_in_the_last_step_is_its_end(tmp_path: Path) -> None:
    config = small_config(tmp_path, train__max_steps=5, train__eval_every=5, checkpoint__every=5)
    assert not train_run(config, StopsAtStep5)["stopped"]
    assert metric_rows(tmp_path / "run")[-1]["step"] == 5


def test_a_stopped_run_that_is_asked_for_no_more_steps_is_complete(tmp_path: Path) -> None:
    config = small_config(tmp_path, train__max_steps=50, train__eval_every=50, checkpoint__every=50)
    assert train_run(config, StopsAtStep5)["stopped"]
    folder_of(config).stop_file.unlink()
    assert not train_run(changed(config, train__max_steps=5))["stopped"]
    assert not json.loads((tmp_path / "run/summary.json").read_text())["stopped"]


def test_a_stop_does_not_wait_for_a_validation_that_is_not_due(tmp_path: Path) -> None:
    config = small_config(tmp_path, train__max_steps=50, train__eval_every=3, checkpoint__every=50)
    train_run(config, StopsAtStep5)
    assert [row["step"] for row in metric_rows(tmp_path / "run") if "val/nll" in row] == [3]


class StopsInValidation(LocalFeeder):
    """Somebody asks for a stop while the first batch of a validation is being computed."""

    num_asked = 0

    def validation(self, index: int) -> Batch:
        folder_of(self._config).stop_file.touch()
        type(self).num_asked += 1
        assert self.num_asked == 1, "the validation went on"
        return super().validation(index)


def without_patience(config: Config, rank: int, size: int) -> LocalFeeder:
    """As where a validation goes on for longer than one waits for it."""
    from distcond.train import state

    state.PATIENCE_S = 0.0
    return StopsInValidation(config, rank, size)


@pytest.mark.parametrize("max_steps", [3, 50])
def test_a_stop_does_not_wait_for_a_validation_that_takes_long(tmp_path: Path, max_steps: int) -> None:
    """Of the last step it is made up for by the next start."""
    config = small_config(
        tmp_path, train__max_steps=max_steps, train__eval_every=3, checkpoint__every=50, data__validation_examples=64
    )
    summary = train_run(config, without_patience)
    assert (summary["step"], summary["stopped"]) == (3, True)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000003\n"
    assert not [row for row in metric_rows(tmp_path / "run") if "val/nll" in row]
    folder_of(config).stop_file.unlink()
    summary = train_run(config)
    validated = [row["step"] for row in metric_rows(tmp_path / "run") if "val/nll" in row]
    assert not summary["stopped"] and validated == ([3] if max_steps == 3 else [*range(6, 50, 3), 50])
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary


def test_a_stop_before_the_first_step_is_a_stop(tmp_path: Path) -> None:
    """While the weights that a run starts from are being validated: nothing is saved, nothing was done."""
    config = small_config(tmp_path / "old", train__max_steps=3)
    train_run(config)
    parent = str(folder_of(config).path)
    config = small_config(tmp_path / "new", train__max_steps=3, data__validation_examples=64, train__init_from=parent)
    assert train_run(config, without_patience)["stopped"]
    folder_of(config).stop_file.unlink()
    summary = train_run(config)
    assert (summary["step"], summary["stopped"]) == (3, False)


class StaleAtStep5(LocalFeeder):
    """The run folder's storage answers no question while step 5 is being trained, as a file server that was restarted."""

    def __init__(self, config: Config, rank: int, size: int) -> None:
        super().__init__(config, rank, size)
        self._is_stale, stat, folder = False, os.stat, str(folder_of(config).path)

        def stale(path: Any, *args: Any, **options: Any) -> os.stat_result:
            if self._is_stale and str(path).startswith(folder):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return stat(path, *args, **options)

        os.stat = stale

    def get(self, step: int, micro: int) -> Batch:
        self._is_stale = step == 4
        return super().get(step, micro)


def test_storage_that_is_stale_for_a_step_ends_no_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, train__max_steps=7, train__eval_every=7, checkpoint__every=2)
    assert train_run(config, StaleAtStep5)["step"] == 7
