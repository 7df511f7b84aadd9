"""`distcond evaluate RUN`: a checkpoint measured in one process gives what its run measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distcond.compose import save_config
from distcond.config import Config
from distcond.errors import RunError
from distcond.ops import kernels, native
from distcond.train.fits import cost_of
from distcond.train.run_folder import RunFolder
from tests.helpers import changed, run_ranks, small_config, train_here


def evaluate(run: Path, step: int | None = None) -> dict[str, Any]:
    # NOTE: imported here, because only the process that runs this file needs DeepSpeed.
    from distcond.evaluate import evaluate

    return evaluate(run, step)


@pytest.fixture(scope="module")
def last_result(text_run: Config) -> dict[str, Any]:
    return evaluate(path_of(text_run))


def path_of(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def test_evaluation_equals_the_last_validation_of_the_run(text_run: Config, last_result: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (path_of(text_run) / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val/bpb" in row][-1]
    result = last_result
    assert result["step"] == last["step"] == 12
    for name in ("val/bpb", "val/element_error", "val/ponder/steps", "val/ponder/cost", "val/ponder/remainder"):
        assert result[name] == pytest.approx(last[name], rel=1e-6), name  # fp32, summed over other batches
    assert result["macs_per_position"] == cost_of(text_run).macs(result["val/ponder/steps"])
    assert result["latency_ms"] > 0
    assert json.loads((path_of(text_run) / "eval/step_00000012.json").read_text()) == result


def test_steps_and_bits_by_place_add_up_to_those_of_the_run(last_result: dict[str, Any]) -> None:
    result = last_result
    share = {name.split("/")[1]: value / 100 for name, value in result.items() if name.endswith("/pct")}
    assert sum(share.values()) == pytest.approx(1) and {"word_start", "inside_a_word", "space", "line_start"} <= set(share)
    for name, whole in (("steps", result["val/ponder/steps"]), ("bits", result["val/bpb"])):
        assert sum(share[place] * result[f"val/{place}/{name}"] for place in share) == pytest.approx(whole, rel=1e-6)
    assert len({result[f"val/{place}/bits"] for place in share}) == len(share)


def test_a_task_is_evaluated_by_its_measure_and_the_kernels_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"data__name": "logic", "data__max_length": 3, "data__max_gates": 2, "model__tree__depth": 0}
    config = small_config(tmp_path, **options, model__tree__full_depth=None, model__halting__halting_bias=-1.0)
    run_ranks(train_here, 1, config)
    save_config(changed(config, cluster__kernels="native"), path_of(config) / "config.yaml")
    result = evaluate(path_of(config))
    assert result["kernels"] == kernels() == ("native" if shutil.which("gcc") else "torch")
    monkeypatch.setenv("PATH", "")
    native.library.cache_clear()
    assert evaluate(path_of(config))["kernels"] == kernels() == "torch"
    by_gates = {name: value for name, value in result.items() if name.startswith("val/gates")}
    assert set(by_gates) == {"val/gates_01/steps", "val/gates_02/steps"}
    assert min(by_gates.values()) <= result["val/ponder/steps"] <= max(by_gates.values())


def test_earlier_checkpoint_can_be_chosen(text_run: Config, last_result: dict[str, Any]) -> None:
    result = evaluate(path_of(text_run), step=6)
    assert result["step"] == 6
    assert result["val/bpb"] > last_result["val/bpb"]
    assert (path_of(text_run) / "eval/step_00000006.json").exists()


def test_missing_step_is_refused_with_those_there_are(text_run: Config) -> None:
    with pytest.raises(RunError, match=r"has no checkpoint of step 7; it has: 6, 12\.$"):
        evaluate(path_of(text_run), step=7)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run folder, for it has no config.yaml"):
        evaluate(tmp_path)


def test_a_run_that_goes_on_is_refused_unless_a_checkpoint_is_chosen(text_run: Config) -> None:
    with RunFolder(path_of(text_run)).locked():
        with pytest.raises(RunError, match=r"is still being written; .* or choose a checkpoint of it by --step N\.$"):
            evaluate(path_of(text_run))
        assert evaluate(path_of(text_run), step=6)["step"] == 6


def test_run_without_a_checkpoint_is_refused(text_run: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((path_of(text_run) / "config.yaml").read_text())
    with pytest.raises(RunError, match="has no checkpoint yet"):
        evaluate(tmp_path)
