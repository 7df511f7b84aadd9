"""What a model takes to keep: settings, seeds, time."""

import json
from pathlib import Path

import pytest

from distcond.compose import compose, save_config
from distcond.config import Config
from distcond.evaluate.upkeep import seconds_of_training, seeds_beside, settings_changed, upkeep
from distcond.train.run_folder import RunFolder
from tests.helpers import changed


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (["run.name=x", "seed=3", "tracking.mode=disabled"], {}),
        (
            ["model=rnn", "data=text", "data.files=[a, b]", "optim.lr=0.5", "model.options={}"],
            {"model": "rnn", "data": "text", "data.files": ["a", "b"], "optim.lr": 0.5},
        ),
        (["model.feed_forward=512", "data.sources={}"], {"model.feed_forward": 512}),
    ],
)
def test_a_setting_counts_that_its_group_does_not_set(overrides: list[str], settings: dict[str, object]) -> None:
    assert settings_changed(compose(overrides)) == settings


def _kept(folder: Path, config: Config, name: str, summary: object = None) -> RunFolder:
    run = RunFolder(folder / name)
    run.path.mkdir()
    save_config(changed(config, run__name=name), run.config_file)
    if summary is not None:
        run.summary_file.write_text(json.dumps(summary))
    return run


def test_seeds_are_runs_that_differ_in_nothing_else(tmp_path: Path) -> None:
    config = Config()
    steps, last = config.train.max_steps, {"last": {"val/bpb": 2.5}}
    own = _kept(tmp_path, config, "a", {"step": steps, "stopped": False, **last})
    _kept(tmp_path, changed(config, seed=1, tracking__group="g"), "b", {"step": steps, "stopped": False, "last": {}})
    _kept(tmp_path, changed(config, seed=2), "c", {"step": 5, "stopped": True, **last})
    _kept(tmp_path, changed(config, seed=3), "d", {"last": 5})
    _kept(tmp_path, changed(config, seed=1), "e", {"step": 7, "stopped": True})
    _kept(tmp_path, changed(config, seed=4, optim__lr=0.1), "f", {"step": steps, "stopped": False, **last})
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "config.yaml").write_bytes(b"\xff\x00: [")
    assert seeds_beside(own, "val/bpb") == {
        "0": {"run": "a", "quality": 2.5, "finished": True},
        "1": {"run": "b", "quality": None, "finished": True},
        "2": {"run": "c", "quality": 2.5, "finished": False},
        "3": {"run": "d", "quality": None, "finished": False},
    }


def test_time_to_retrain_is_that_of_the_steps_and_validations_up_to_the_checkpoint(tmp_path: Path) -> None:
    rows = [
        {"step": 10, "perf/step_ms": 100.0},
        {"step": 15, "val/bpb": 2.0, "perf/validation_s": 4.0},
        {"step": 25, "perf/step_ms": 200.0},
        {"step": 30, "perf/step_ms": 1e9},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 5, "perf\n7\n' + "[" * 100_000 + "\n" + "".join(f"{json.dumps(row)}\n" for row in rows))
    assert seconds_of_training(file, step=25) == pytest.approx(1.0 + 4.0 + 3.0)
    assert seconds_of_training(tmp_path / "none.jsonl", step=20) == 0


def _trained(folder: Path, name: str, step_ms: float, init_from: str = "") -> tuple[RunFolder, Config]:
    """A run of 20 steps, from step 10 of another one."""
    config = changed(Config(), train__init_from=init_from and str(folder / init_from), run__dir=str(folder))
    start = {"init_from": {"run": str(folder / init_from), "step": 10}} if init_from else {}
    run = _kept(folder, config, name, {"step": 20, **start})
    rows = [{"step": 0, "val/bpb": 2.0, "perf/validation_s": 1.0}] if init_from else []
    rows += [{"step": step, "perf/step_ms": step_ms} for step in (10, 20)]
    run.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return run, config


def test_time_to_retrain_holds_that_of_the_runs_it_grew_from_up_to_where_it_did(tmp_path: Path) -> None:
    dense, _ = _trained(tmp_path, "dense", 100.0)
    up, _ = _trained(tmp_path, "up", 200.0, "dense")
    deep, config = _trained(tmp_path, "deep", 400.0, "up")
    figures = upkeep(deep, config, 20, "val/bpb")
    assert figures["maintainability/retrain_s"] == pytest.approx((1.0 + 8.0) + (1.0 + 2.0) + 1.0)
    assert figures["maintainability/parents"] == [
        {"run": str(up.path), "step": 10, "train_s": pytest.approx(3.0)},
        {"run": str(dense.path), "step": 10, "train_s": pytest.approx(1.0)},
    ]
    alone = upkeep(dense, changed(config, train__init_from=""), 20, "val/bpb")
    assert alone["maintainability/retrain_s"] == pytest.approx(2.0) and "maintainability/parents" not in alone


@pytest.mark.parametrize("gone", ["dense", "up", "dense/metrics.jsonl", "dense/summary.json", "deep/summary.json"])
def test_where_a_run_it_grew_from_is_gone_the_time_is_not_known_and_that_run_is_named(tmp_path: Path, gone: str) -> None:
    _trained(tmp_path, "dense", 100.0)
    _trained(tmp_path, "up", 200.0, "dense")
    deep, config = _trained(tmp_path, "deep", 400.0, "up")
    (tmp_path / gone).rename(tmp_path / "away")
    figures = upkeep(deep, config, 20, "val/bpb")
    assert "maintainability/retrain_s" not in figures
    last = figures["maintainability/parents"][-1]
    assert last["train_s"] is None and last["run"] == str(tmp_path / ("up" if gone.startswith(("up", "deep")) else "dense"))


def test_runs_that_moved_together_still_tell_the_time_to_retrain(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    _trained(tmp_path / "here", "dense", 100.0)
    _trained(tmp_path / "here", "up", 200.0, "dense")
    _, config = _trained(tmp_path / "here", "deep", 400.0, "up")
    (tmp_path / "here").rename(tmp_path / "there")
    figures = upkeep(RunFolder(tmp_path / "there" / "deep"), config, 20, "val/bpb")
    assert figures["maintainability/retrain_s"] == pytest.approx((1.0 + 8.0) + (1.0 + 2.0) + 1.0)


def test_runs_that_name_each_other_come_to_an_end(tmp_path: Path) -> None:
    _trained(tmp_path, "one", 100.0, "two")
    two, config = _trained(tmp_path, "two", 100.0, "one")
    assert len(upkeep(two, config, 20, "val/bpb")["maintainability/parents"]) == 2
