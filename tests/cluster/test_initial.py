"""What a run starts from is found and judged where the command is typed, in a line and before Ray starts."""

import shutil
import time
from pathlib import Path

import pytest

from distcond.cli import main
from distcond.cluster import trainer
from distcond.cluster.initial import check_start
from distcond.cluster.sweep import name_sweep, sweep
from distcond.cluster.trainer import name_run
from distcond.compose import save_config
from distcond.config import Config
from distcond.errors import RunError
from distcond.train.run_folder import RunFolder, parent_of
from tests.cluster.processes import Command, crowded, read_rows
from tests.helpers import changed


@pytest.fixture
def child(text_run: Config, tmp_path: Path) -> Config:
    """What a user asks for who starts from a copy of a finished run, whose `up` is a tree."""
    shutil.copytree(Path(text_run.run.dir) / "run", tmp_path / "parent")
    named = {"run__dir": str(tmp_path), "run__name": "child", "train__init_from": str(tmp_path / "parent")}
    config: Config = changed(text_run, model__tree__layers=["up", "down"], train__profile=False, **named)
    return config


def test_a_parent_is_a_folder_or_a_run_in_the_folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "config.yaml").touch()
    for given, found in {
        "": "",
        "dense": f"{tmp_path}/runs/dense",
        "beside": f"{tmp_path}/beside",
        "runs/dense": f"{tmp_path}/runs/dense",
        "../dense/": f"{tmp_path.parent}/dense",
        "~/dense": f"{tmp_path}/home/dense",
    }.items():
        config = changed(Config(), train__init_from=given)
        assert parent_of(config) == name_run(config).train.init_from == name_sweep(config).train.init_from == found
        assert name_run(name_run(config)).train.init_from == found


def test_a_line_says_what_becomes_of_the_run(child: Config, tmp_path: Path) -> None:
    start = f"init  {tmp_path}/parent at step 12"
    assert check_start([child]) == f"{start}; new trees of depth 3: down"
    assert check_start([changed(child, model__tree__layers=["up"])]) == start
    deeper = changed(child, model__tree__depth=5, model__tree__layers=["up"])
    assert check_start([deeper]) == f"{start}; trees of depth 3 become 5 deep: up"
    other = changed(child, model__halting__kind="fixed", model__tree__layers=["up"])
    assert check_start([other]) == f"{start}; it halts otherwise (fixed, was act), so figures will differ"


def test_a_run_with_checkpoints_of_its_own_no_longer_needs_its_parent(child: Config, tmp_path: Path) -> None:
    (tmp_path / "parent").rename(tmp_path / "child")
    assert check_start([child]) == ""
    with pytest.raises(RunError, match="parent holds no run to start from"):
        check_start([child, changed(child, run__name="another")])


@pytest.mark.thorough
def test_where_the_newest_checkpoint_is_damaged_an_older_one_serves(child: Config, tmp_path: Path) -> None:
    (tmp_path / "parent" / "checkpoints" / "step_00000012" / "dense.safetensors").write_bytes(b"damage")
    assert check_start([child]).startswith(f"init  {tmp_path}/parent at step 6")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("gone", "holds no run to start from; give a run folder, or the name of a run in run.dir"),
        ("untrained", "has no checkpoint to start from; train that run to its first one"),
        ("damaged", r"dense.safetensors is damaged or missing .* no other checkpoint is intact"),
        ("other data", "was trained on data=parity, whose examples or vocabulary are not those of data=text"),
        ("other model", r"holds another model: model.width=16 \(was 32\); use the settings of that run, or leave"),
    ],
)
def test_a_parent_that_cannot_be_started_from_is_told_before_anything_starts(
    harm: str, message: str, child: Config, text_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = RunFolder(tmp_path / "parent")
    if harm == "gone":
        shutil.rmtree(parent.path)
    elif harm == "untrained":
        shutil.rmtree(parent.checkpoints)
    elif harm == "damaged":
        for file in parent.checkpoints.glob("*/dense.safetensors"):
            file.write_bytes(b"damage")
    elif harm == "other data":
        save_config(changed(text_run, data__name="parity", model__name="rnn"), parent.config_file)
    else:
        save_config(changed(text_run, model__width=32), parent.config_file)
    start = time.monotonic()
    with pytest.raises(RunError, match=message):
        trainer.launch(child)
    assert time.monotonic() - start < 5  # 0.1 s, on a machine that is busy with other tests
    assert not (tmp_path / "child").exists()
    save_config(child, tmp_path / "child.yaml")
    assert main(["train", "--dry-run", "--config", str(tmp_path / "child.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distcond: error: ") and error.count("\n") == 1


def test_a_parent_that_still_trains_is_refused(child: Config, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "parent").locked(), pytest.raises(RunError, match="parent is still being written; wait for"):
        check_start([child])


@pytest.mark.thorough
def test_a_dry_run_names_the_start(child: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(child, tmp_path / "child.yaml")
    assert main(["train", "--dry-run", "--config", str(tmp_path / "child.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"init  {tmp_path}/parent at step 12; new trees of depth 3: down"


def test_a_fork_starts_from_its_own_run_alone(child: Config, tmp_path: Path) -> None:
    fork = changed(child, run__name="parent", run__fork=True, train__init_from=str(tmp_path / "other"))
    with pytest.raises(RunError, match=r"run.fork=true starts from .* run.name=parent, .*init_from=.*other.* leave one of them"):
        trainer.launch(fork)


@pytest.mark.thorough
def test_a_sweep_asks_for_its_trials_before_ray_starts(child: Config) -> None:
    trials = changed(child, run__name="", sweep__space={"model.width": [16, 32]})
    with pytest.raises(RunError, match=r"holds another model: model.width=32 \(was 16\)"):
        sweep(trials)
    assert not (Path(child.run.dir) / trials.sweep.name / "sweep.json").exists()


@pytest.mark.ray
@pytest.mark.slow  # a whole command; what it rests on is tested more cheaply, too
def test_a_command_grows_a_run_where_it_ended_and_needs_it_no_more(child: Config, tmp_path: Path) -> None:
    named = crowded(changed(child, train__init_from="parent", train__max_steps=2))
    save_config(named, tmp_path / "child.yaml")
    command = Command(tmp_path, "--config", "child.yaml")
    assert command.end() == (0, "")
    assert f"init  {tmp_path}/parent at step 12; new trees of depth 3: down\n" in command.lines
    before, after = (read_rows(tmp_path / name) for name in ("parent", "child"))
    last = [row for row in before if "val/bpb" in row][-1]
    assert after[0]["step"] == 0
    assert after[0]["val/bpb"] == pytest.approx(last["val/bpb"], rel=1e-6)  # products of few rows add in another order
    shutil.rmtree(tmp_path / "parent")
    save_config(changed(named, train__max_steps=3), tmp_path / "child.yaml")
    assert Command(tmp_path, "--config", "child.yaml").end() == (0, "")
    assert [row["step"] for row in read_rows(tmp_path / "child") if "train/loss" in row][-1] == 3
