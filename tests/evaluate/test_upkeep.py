"""What a model takes to keep: settings, seeds, time."""

import json
from pathlib import Path

import pytest

from distcond.compose import compose, save_config
from distcond.config import Config
from distcond.evaluate.upkeep import seconds_of_training, seeds_beside, settings_changed
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
