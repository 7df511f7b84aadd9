"""A whole run: its rhythm, its metrics, and how it stops."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from distcond.config import Config
from distcond.data.batch import Batch
from distcond.data.batches import LocalFeeder
from distcond.nn import StepBudget
from distcond.train.state import Run
from tests.helpers import changed, folder_of, run_ranks, small_config, train_here, train_run

TRAINING = {
    *("train/loss", "train/bpb", "train/element_error", "ponder/steps", "ponder/cost", "ponder/remainder"),
    *("tree/leaf_entropy_nats", "tree/load_max_over_mean", "tree/materialized_nodes", "tree/dead_leaves", "tree/capped_pct"),
    *("tree/rank_load_max_over_mean", "tree/nonfinite_inputs"),
    *("perf/tokens_per_s", "perf/step_ms", "perf/data_wait_pct", "perf/exchange_pct", "mem/rss_gib"),
    *("optim/lr", "optim/grad_norm", "optim/skipped_steps"),
}
VALIDATION = {
    *("val/bpb", "val/element_error", "val/ponder/steps", "val/ponder/cost", "val/ponder/remainder"),
    "perf/validation_s",
}


def rows_of(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.run.dir) / config.run.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_metric_is_there_and_finite(text_run: Config) -> None:
    training = [row for row in rows_of(text_run) if "train/loss" in row]
    validation = [row for row in rows_of(text_run) if "val/bpb" in row]
    assert [row["step"] for row in training] == [3, 6, 9, 12]
    assert [row["step"] for row in validation] == [5, 10, 12]
    assert all(row.keys() == {"step", *TRAINING} for row in training)
    assert all(row.keys() == {"step", *VALIDATION} for row in validation)
    assert all(math.isfinite(value) for row in rows_of(text_run) for value in row.values())


def test_metrics_are_consistent(text_run: Config) -> None:
    tau = text_run.model.halting.initial_penalty
    for row in (row for row in rows_of(text_run) if "train/loss" in row):
        assert row["train/loss"] == pytest.approx(row["train/bpb"] * math.log(2) + tau * row["ponder/cost"])
        assert row["ponder/cost"] == pytest.approx(row["ponder/steps"] + row["ponder/remainder"])
        assert row["optim/skipped_steps"] == 0
        assert 0 <= row["perf/exchange_pct"] <= 100 and 0 <= row["perf/data_wait_pct"] <= 100
        tokens = text_run.data.global_batch_size * text_run.data.context  # of a step
        assert row["perf/tokens_per_s"] == pytest.approx(1e3 * tokens / row["perf/step_ms"])


def long_exchanges_in_validation(config: Config, rank: int, size: int) -> LocalFeeder:
    """A feeder of a run whose validations exchange for a thousand seconds of the collective's clock."""
    from distcond.train import hooks

    validate = hooks.validate

    def slow(run: Run) -> Tensor | None:
        run.engine.tables.expert.elapsed_s += 1000.0
        return validate(run)

    hooks.validate = slow  # type: ignore[assignment]
    return LocalFeeder(config, rank, size)


def test_a_validation_takes_no_time_of_a_window_of_training(tmp_path: Path) -> None:
    config = small_config(tmp_path, train__max_steps=4, train__log_every=4, train__eval_every=2, checkpoint__every=2)
    train_run(config, long_exchanges_in_validation)
    (row,) = (row for row in rows_of(config) if "train/loss" in row)
    assert 0 <= row["perf/exchange_pct"] <= 100


def test_model_learns_and_the_summary_names_its_best_step(text_run: Config) -> None:
    validation = [row for row in rows_of(text_run) if "val/bpb" in row]
    summary = json.loads((Path(text_run.run.dir) / "run/summary.json").read_text())
    best = min(validation, key=lambda row: row["val/bpb"])
    assert validation[-1]["val/bpb"] < validation[0]["val/bpb"] < 8  # 8: what a uniform guess costs
    assert summary["best"] == {"metric": "val/bpb", "value": best["val/bpb"], "step": best["step"]}
    assert summary["last"]["val/bpb"] == validation[-1]["val/bpb"]
    assert (summary["step"], summary["stopped"]) == (12, False)


def test_environment_says_what_a_result_depends_on(text_run: Config) -> None:
    environment = json.loads((Path(text_run.run.dir) / "run/environment.json").read_text())
    assert {"distcond", "torch", "deepspeed", "numpy"} <= environment["packages"].keys()
    assert all(len(environment["data"][split]["sha256"]) == 64 for split in ("train", "validation"))


@pytest.mark.thorough
def test_profile_writes_a_trace_of_each_rank(text_run: Config) -> None:
    folder = Path(text_run.run.dir) / "run/logs/profile"
    traces = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    assert traces.keys() == {"rank_0.json", "rank_1.json"}
    assert all("aten::linear" in {event.get("name") for event in trace["traceEvents"]} for trace in traces.values())


# ---- stopping and going on ---------------------------------------------------------------------------------------------


ONE_SIDED = "stop_as_rank_1_sees_it"
"A file system may show a new file to one rank before the others."


class StoppingFeeder(LocalFeeder):
    """Somebody asks for a stop while step 2 is being trained."""

    def get(self, step: int, micro: int) -> Batch:
        if step == 2:
            (folder_of(self._config).path / ONE_SIDED).touch()
        return super().get(step, micro)


def stop_here(config: Config) -> dict[str, Any]:
    """A run of which only rank 1 ever sees the request to stop."""
    from distcond.train.loop import run_training

    folder, rank = folder_of(config), dist.get_rank()
    if rank == 1:
        folder.stop_file = folder.path / ONE_SIDED
    return run_training(config, folder, StoppingFeeder(config, rank, 2), asdict(config))


@pytest.mark.thorough
def test_stop_file_ends_all_ranks_after_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    config = small_config(tmp_path, cluster__num_workers=2, train__max_steps=50, checkpoint__every=50, train__eval_every=50)
    for summary in run_ranks(stop_here, 2, config):
        assert (summary["step"], summary["stopped"]) == (3, True)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000003\n"
    assert not [row for row in rows_of(config) if "val/nll" in row]  # none was due
    summary = train_run(changed(config, train__max_steps=5))
    assert (summary["step"], summary["stopped"]) == (5, False)
    assert [row["step"] for row in rows_of(config) if "train/loss" in row] == [1, 2, 3, 4, 5]


def test_finished_run_is_left_as_it_is(text_run: Config) -> None:
    folder = Path(text_run.run.dir) / "run"
    before = (folder / "metrics.jsonl").read_bytes()
    assert train_run(text_run) == json.loads((folder / "summary.json").read_text())
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("num_workers", "accumulation"), [(1, 1), (2, 2)])
@pytest.mark.thorough
def test_the_budget_sees_the_steps_and_the_loss_of_the_whole_batch_once_an_update(
    tmp_path: Path, num_workers: int, accumulation: int
) -> None:
    size = {"cluster__num_workers": num_workers, "optim__accumulation": accumulation}
    config = small_config(tmp_path, **size, model__halting__target_steps=1.5, train__max_steps=5)
    train_run(config, InfiniteFeeder)
    rows = [row for row in rows_of(config) if "ponder/penalty" in row]
    budget = StepBudget(1.5)
    assert [row["optim/skipped_steps"] for row in rows] == [1, 0, 0, 0, 0] and rows[0]["ponder/penalty"] == 0.0
    for row in rows[1:]:  # a vector of parity is a sequence of one position
        budget.commit(row["ponder/steps"], row["train/nll"], row["optim/lr"])
        assert row["ponder/penalty"] == pytest.approx(budget.penalty, rel=1e-12)
        assert row["train/loss"] == pytest.approx(row["train/nll"] + budget.penalty * row["ponder/cost"])


class InfiniteFeeder(LocalFeeder):
    """One number of the very first step is none that anybody can use."""

    def get(self, step: int, micro: int) -> Batch:
        batch = super().get(step, micro)
        if step == 0:
            batch.inputs[0, 0, 0] = math.inf
        return batch


def skip_a_step(configs: list[Config]) -> None:
    for config in configs:
        train_here(config, InfiniteFeeder)


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Config]:
    """By ZeRO stage, runs that skipped their first step and went on from a checkpoint of no update at all."""
    rhythm = {"train__max_steps": 3, "checkpoint__every": 1, "train__eval_every": 3}
    configs = {
        stage: small_config(tmp_path_factory.mktemp("skipping"), cluster__num_workers=2, optim__zero_stage=stage, **rhythm)
        for stage in (0, 2, 3)
    }
    run_ranks(skip_a_step, 2, [changed(config, train__max_steps=1) for config in configs.values()])
    run_ranks(skip_a_step, 2, list(configs.values()))
    return configs


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.thorough
def test_skipped_step_is_counted_once_and_can_be_saved(skipping: dict[int, Config], stage: int) -> None:
    config = skipping[stage]
    assert [row["optim/skipped_steps"] for row in rows_of(config) if "optim/skipped_steps" in row] == [1, 0, 0]
    state = json.loads((Path(config.run.dir) / "run/checkpoints/step_00000003/state.json").read_text())
    assert (state["step"], state["updates"]) == (3, 2)
