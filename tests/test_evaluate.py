"""`distcond evaluate RUN`: a checkpoint measured in one process gives what its run measured."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distcond.cli import main
from distcond.compose import save_config
from distcond.config import Config
from distcond.errors import RunError
from distcond.ops import kernels, native
from distcond.train.checkpoint import fingerprint
from distcond.train.fits import cost_of
from distcond.train.run_folder import RunFolder
from tests.helpers import changed, run_ranks, small_config, train_here


def evaluate(run: Path, step: int | None = None, against: Path | None = None) -> dict[str, Any]:
    # NOTE: imported here, because only the process that runs this file needs DeepSpeed.
    from distcond.evaluate import evaluate

    return evaluate(run, step, against)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Each batch is timed twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distcond.evaluate.latency.MOST_REPEATS", 2)
        yield


@pytest.fixture(autouse=True)
def quicker(last_result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is evaluated after the first result is timed one example at a time."""
    monkeypatch.setattr("distcond.evaluate.latency.LONGEST_CALL_S", 0.0)


@pytest.fixture(scope="module")
def text_run(text_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A copy: an evaluation leaves its result in the folder of the run."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(path_of(text_run), folder / text_run.run.name)
    return changed(text_run, run__dir=str(folder))  # type: ignore[no-any-return]


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
    assert all(result[f"latency_ms/batch_{size}/p50"] > 0 for size in (1, 32, 1024))
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


def test_the_histogram_is_of_the_steps_and_the_interval_of_the_quality(text_run: Config, last_result: dict[str, Any]) -> None:
    histogram = last_result["val/ponder/steps_histogram"]
    assert sum(histogram) == pytest.approx(1)
    assert sum((n + 1) * share for n, share in enumerate(histogram)) == pytest.approx(last_result["val/ponder/steps"])
    assert (
        sum(histogram[: last_result["val/ponder/steps_p95"]]) >= 0.95 > sum(histogram[: last_result["val/ponder/steps_p95"] - 1])
    )
    assert last_result["val/bpb/low"] < last_result["val/bpb"] < last_result["val/bpb/high"]
    assert last_result["val/bpb"] < last_result["val/bpb/worst_tenth"] and last_result["hardest_by"] == "zlib"
    assert last_result["macs_per_example"] == 16 * last_result["macs_per_position"]  # bytes of context
    cost = cost_of(text_run)
    assert 0 < last_result["bytes_touched_per_example"] < 4 * (cost.dense_parameters + cost.node_parameters)


def test_forced_steps_end_with_those_that_halting_takes_at_most(last_result: dict[str, Any]) -> None:
    fixed = last_result["control/fixed_steps"]
    most = len(last_result["val/ponder/steps_histogram"])
    assert list(fixed) == [str(number) for number in range(1, most + 1)] and len(set(fixed.values())) == most
    assert min(abs(value - last_result["val/bpb"]) for value in fixed.values()) < 0.01


def test_a_second_evaluation_finds_the_same_and_no_difference_to_itself(text_run: Config, last_result: dict[str, Any]) -> None:
    result = evaluate(path_of(text_run), against=path_of(text_run))
    timed = ("latency_ms/", "throughput", "peak_memory")
    for figures in (result, result["against"]):
        assert {k: v for k, v in figures.items() if not k.startswith((*timed, "against"))} == {
            k: v for k, v in last_result.items() if not k.startswith(timed)
        }
    ratios = result["against/ratios"]
    assert {key: value for key, value in ratios.items() if not key.startswith(timed)} == dict.fromkeys(
        [key for key in ratios if not key.startswith(timed)], 1.0
    )
    assert [key for key in result if key.startswith("latency_ms") and key.endswith("p50")] == ["latency_ms/batch_1/p50"]
    assert {"val/bpb", "macs_per_position", "bytes_touched_per_example", "latency_ms/batch_1/p50"} <= set(ratios)
    assert [result[f"against/difference{end}"] for end in ("", "/low", "/high")] == [0, 0, 0]


def test_earlier_checkpoint_can_be_chosen(text_run: Config, last_result: dict[str, Any]) -> None:
    result = evaluate(path_of(text_run), step=6)
    assert result["step"] == 6
    assert result["val/bpb"] > last_result["val/bpb"]
    assert 0 < result["maintainability/retrain_s"] < last_result["maintainability/retrain_s"]
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


@pytest.fixture
def copied(text_run: Config, tmp_path: Path) -> Path:
    """A copy of the run that may be harmed."""
    return Path(shutil.copytree(path_of(text_run), tmp_path / "run"))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert main(["evaluate", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("distcond: error: ") and err.count("\n") == 1
    return err


def test_bad_runs_are_refused_in_one_line(copied: Path, text_run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    good, newest = path_of(text_run), copied / "checkpoints" / "step_00000012"
    assert "no/run is not a run folder" in refusal(capsys, good, "--against", "no/run")
    with RunFolder(copied).locked():
        assert "is still being written" in refusal(capsys, copied)
        assert "is still being written" in refusal(capsys, good, "--against", copied)
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("context: 16", "context: 8"))
    assert "have different data: data.context=16 and 8; give --against a run" in refusal(capsys, good, "--against", copied)
    (copied / "config.yaml").write_text("seed: [")
    assert str(copied / "config.yaml") in refusal(capsys, copied)
    (copied / "config.yaml").write_text(config)
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, "format_version": 0}))
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, "state.json": fingerprint(newest / "state.json")}))
    assert "has format 0; this version reads 1" in refusal(capsys, copied)
    for checkpoint in newest.parent.glob("step_*"):
        (checkpoint / "dense.safetensors").write_bytes(b"damaged")
    assert "dense.safetensors is damaged or missing" in refusal(capsys, copied)
    shutil.rmtree(newest.parent)
    assert f"no checkpoint yet; train it first: distcond train --config {copied}/config.yaml" in refusal(capsys, copied)


def test_the_table_begins_with_the_four_figures_of_a_proof_of_concept(
    text_run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(path_of(text_run)), "--step", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith((" ", "val/", "control/", "maintainability/"))][:4] == [
        "operating cost",
        "accuracy",
        "latency",
        "maintainability",
    ]
