"""A run that starts from the newest checkpoint of another one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distcond.cli import main
from distcond.compose import save_config
from distcond.config import Config
from distcond.errors import ConfigError, RunError
from distcond.train.checkpoint import newest_checkpoint
from distcond.train.fork import fork_run
from distcond.train.run_folder import RunFolder
from tests.helpers import changed, folder_of, small_config, train_run


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run on two ranks, whose tables are lazy; not to be changed."""
    config = small_config(tmp_path_factory.mktemp("parent"), model__tree__storage="lazy", model__halting__target_steps=2.0)
    train_run(config)
    save_config(config, folder_of(config).config_file)
    return config


@pytest.fixture
def config(parent: Config, tmp_path: Path) -> Config:
    """What a user asks for who forks a copy of that run."""
    shutil.copytree(Path(parent.run.dir) / "run", tmp_path / "run")
    return changed(parent, run__dir=str(tmp_path), run__fork=True, train__max_steps=6, optim__lr=5e-3)


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_fork_is_a_run_of_its_own_that_goes_on_from_the_checkpoint(config: Config, tmp_path: Path) -> None:
    before = tree_of(tmp_path / "run")
    forked, step = fork_run(config, print)
    assert step == 4
    assert (forked.run.name, forked.run.fork) == ("run-fork", False)
    assert changed(forked, run__name="run", run__fork=True) == config
    summary = train_run(forked)
    assert summary["step"] == 6
    assert summary["forked_from"] == {"run": "run", "step": 4}
    assert summary["best"]["step"] == 6  # what the old run reached, it reached with other settings
    rows = [json.loads(line) for line in (tmp_path / "run-fork" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [5, 6]
    assert {row["optim/lr"] for row in rows if "train/loss" in row} == {5e-3}
    assert tree_of(tmp_path / "run") == before


@pytest.mark.thorough
def test_with_nothing_changed_a_fork_is_the_old_run_continued(config: Config, parent: Config, tmp_path: Path) -> None:
    longer = changed(config, optim__lr=parent.optim.lr)
    forked, _ = fork_run(longer, print)
    train_run(forked)
    train_run(changed(longer, run__fork=False))
    ends = [newest_checkpoint(RunFolder(tmp_path / name).checkpoints)[0] for name in ("run", "run-fork")]
    assert ends[0] is not None and ends[1] is not None
    for file in ends[0].glob("*.safetensors"):
        assert file.read_bytes() == (ends[1] / file.name).read_bytes(), file.name


def test_damage_to_the_old_run_spares_the_fork(config: Config, tmp_path: Path) -> None:
    forked, _ = fork_run(config, print)
    for file in (tmp_path / "run" / "checkpoints").rglob("*.*"):
        if file.is_file():
            with file.open("r+b") as stream:
                stream.write(b"damage")
    assert newest_checkpoint(folder_of(forked).checkpoints) == (tmp_path / "run-fork" / "checkpoints" / "step_00000004", {})


def test_every_fork_has_a_name_of_its_own(config: Config) -> None:
    assert [fork_run(config, print)[0].run.name for _ in range(3)] == ["run-fork", "run-fork2", "run-fork3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__name": "other"}, "other holds no run to start from; check run.name and run.dir"),
        ({"train__max_steps": 4}, "is already at step 4 of train.max_steps=4; raise train.max_steps"),
    ],
)
def test_nothing_to_start_from_or_to_do_is_told_in_a_line(changes: dict[str, Any], message: str, config: Config) -> None:
    with pytest.raises(RunError, match=message):
        fork_run(changed(config, **changes), print)
    assert not list(Path(config.run.dir).glob("*-fork*"))


def test_a_run_without_a_checkpoint_is_told(config: Config, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(RunError, match="run has no checkpoint to start from; train it to its first one"):
        fork_run(config, print)


def test_a_dry_run_of_a_fork_says_where_it_starts_and_refuses_what_the_run_would(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(config, tmp_path / "fork.yaml")
    words, before = ["train", "--dry-run", "--config", str(tmp_path / "fork.yaml")], tree_of(tmp_path)
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("\nfork  run at step 4 goes on as another run\n")
    save_config(changed(config, train__max_steps=4), tmp_path / "fork.yaml")
    assert main(words) == 2
    assert "is already at step 4 of train.max_steps=4; raise train.max_steps" in capsys.readouterr().err
    save_config(config, tmp_path / "fork.yaml")
    assert tree_of(tmp_path) == before
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main(words) == 2
    assert "run has no checkpoint to start from; train it to its first one" in capsys.readouterr().err


def test_a_fork_needs_a_name() -> None:
    with pytest.raises(ConfigError, match=r"run.fork=true needs the run to start from; give run.name"):
        changed(Config(), run__fork=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__width": 32},
        {"model__tree__depth": 4},
        {"model__tree__rank": 3},
        {"model__tree__storage": "dense"},
        {"model__cell": "gru"},
        {"data__num_bits": 9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_new_model_cannot_take_is_one_clear_line(changes: dict[str, Any], config: Config) -> None:
    forked, _ = fork_run(changed(config, **changes), print)
    with pytest.raises(AssertionError, match=r"RunError: .*run-fork/checkpoints/step_00000004 holds .*, the model"):
        train_run(forked)


@pytest.mark.parametrize("target", [None, 3.0])
@pytest.mark.thorough
def test_a_fork_may_leave_or_change_its_budget(target: float | None, config: Config) -> None:
    forked, _ = fork_run(changed(config, model__halting__target_steps=target), print)
    assert train_run(forked)["step"] == 6


@pytest.mark.thorough
def test_a_fork_may_get_a_budget(tmp_path: Path) -> None:
    config = small_config(tmp_path, cluster__num_workers=1)
    train_run(config)
    save_config(config, folder_of(config).config_file)
    forked, _ = fork_run(changed(config, run__fork=True, train__max_steps=6, model__halting__target_steps=2.0), print)
    assert train_run(forked)["step"] == 6
