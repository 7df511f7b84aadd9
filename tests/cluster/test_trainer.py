import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distcond.cluster import trainer
from distcond.cluster.trainer import closing_lines, fit, name_run, prepare_run
from distcond.compose import load_config, override, save_config
from distcond.config import Config
from distcond.errors import ClusterError, DataError, LostError, RunError, TrainingError
from distcond.train.run_folder import RunFolder
from tests.cluster.processes import NUM_STEPS, Command, crowded, read_rows, wait_until, within, words
from tests.helpers import small_config, text_config, train_run

# --- names and folders ------------------------------------------------------------------------------------------------


def test_a_run_has_a_name_and_an_absolute_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = name_run(Config())
    assert config.run.dir == str(tmp_path / "runs")
    assert config.run.name.startswith("transformer-stdlib-20")
    assert name_run(config) == config


def test_a_name_used_again_continues_that_run_or_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    path = prepare_run(config)
    (path / "stop").touch()
    longer = override(config, {"train.max_steps": 9})
    assert prepare_run(override(config, {"model.width": 64})) == path  # nothing was trained yet
    assert prepare_run(longer) == path
    assert load_config(path / "config.yaml") == longer
    assert not (path / "stop").exists()  # that was for the run before
    (path / "metrics.jsonl").touch()
    with pytest.raises(RunError, match=r"model.width=32 \(was 16\); go on .*, use another run.name, or run.fork=true to"):
        prepare_run(override(config, {"model.width": 32}))


def test_a_folder_that_is_being_written_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    with RunFolder(tmp_path / "run").locked(), pytest.raises(RunError, match=f"is being written by process {os.getpid()}"):
        prepare_run(config)


def test_what_has_no_room_is_refused_before_ray_starts_and_leaves_nothing(tmp_path: Path) -> None:
    config = small_config(tmp_path, cluster__num_workers=2**16, data__global_batch_size=2**16)
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"cluster.num_workers=65536 x 1 CPU asks for 65536 CPUs; this machine has \d+: use"):
        trainer.launch(config)
    assert time.monotonic() - start < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "asked", "available"),
    [
        ({"cluster__num_workers": 2**16, "data__global_batch_size": 2**16}, "asks for 65536 CPUs", r"this machine has \d+"),
        pytest.param({"cluster__gpus_per_worker": 64.0}, "asks for 128 GPUs", r"this machine has \d", marks=pytest.mark.thorough),
        pytest.param(
            {"model__tree__storage": "dense", "model__tree__depth": 20, "model__width": 4096},
            r"needs \d[\d,]+ bytes",
            r"\d[\d,]+ are available",
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["CPU", "GPU", "memory"],
)
def test_what_cannot_be_had_ends_within_5_s_with_both_numbers(
    changes: dict[str, Any], asked: str, available: str, tmp_path: Path
) -> None:
    save_config(small_config(tmp_path / "runs", **changes), tmp_path / "config.yaml")
    command = [sys.executable, "-m", "distcond", "train", "--config", "config.yaml"]
    ended = within(5, lambda: subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(rf"distcond: error: .*{asked}.*{available}.*\n", ended.stderr)
    assert not (tmp_path / "runs").exists()


def test_a_fork_is_for_one_run_alone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run.fork=true starts one new run by `distcond train`; leave it out here"):
        prepare_run(small_config(tmp_path, run__fork=True))


@pytest.mark.parametrize(
    ("summary", "lines"),
    [
        (
            {"step": 9, "stopped": False, "best": {"metric": "val/bpb", "value": 2.13456, "step": 8}},
            ["run   runs/a b (step 9 of 9, 2:05)", "best  val/bpb 2.135 at step 8", "next  distcond evaluate 'runs/a b'"],
        ),
        (
            {"stopped": True},
            [
                "run   runs/a b (step 0 of 9, 2:05)",
                "best  no validation yet",
                "next  distcond train --config 'runs/a b/config.yaml'",
            ],
        ),
        (
            {"step": 10, "stopped": False},  # of more than train.max_steps, which was lowered
            ["run   runs/a b (step 10, 2:05)", "best  no validation yet", "next  distcond evaluate 'runs/a b'"],
        ),
    ],
)
def test_the_last_lines_say_where_how_good_and_what_next(
    summary: dict[str, Any], lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert closing_lines(tmp_path / "runs/a b", summary, 9, 125.0) == lines


def no_ray(*_: Any) -> dict[str, Any]:
    raise AssertionError("Ray is started")


def test_a_complete_run_is_told_as_such_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path, train__max_steps=2)
    summary = train_run(config)
    monkeypatch.setattr(trainer, "_run", no_ray)
    assert trainer.launch(config) == summary
    assert capsys.readouterr().out.startswith("All of train.max_steps=2 are done already.\nrun   ")
    with pytest.raises(AssertionError, match="Ray is started"):
        trainer.launch(override(config, {"train.max_steps": 3}))
    damaged = next((tmp_path / "run/checkpoints/step_00000002").glob("*.safetensors"))
    damaged.write_bytes(b"damage")
    with pytest.raises(AssertionError, match="Ray is started"):
        trainer.launch(config)


def test_a_run_does_not_go_on_with_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = text_config(tmp_path, cluster__num_workers=1, train__max_steps=2)
    train_run(config)
    monkeypatch.setattr(trainer, "_run", no_ray)
    longer = override(config, {"train.max_steps": 3})
    with pytest.raises(AssertionError, match="Ray is started"):
        trainer.launch(longer)
    before = json.loads((tmp_path / "run/environment.json").read_text())
    before["data"]["python"] = "3.10"  # which may change, where the text is the same
    (tmp_path / "run/environment.json").write_text(json.dumps(before))
    with pytest.raises(AssertionError, match="Ray is started"):
        trainer.launch(longer)
    with (tmp_path / "corpus/0.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(RunError, match=r"run was trained on other data than data=text is now; restore its files, use another"):
        trainer.launch(longer)


@pytest.mark.parametrize(
    ("error", "ends_in"),
    [
        (TrainingError("the last checkpoint, of step 7, could not be written: No space left on device."), TrainingError),
        (LostError("worker 0, 1 lost."), KeyboardInterrupt),
    ],
)
def test_after_a_request_to_stop_what_ranks_found_is_told_and_what_nobody_saw_is_no_failure(
    error: TrainingError, ends_in: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: Config, wait_for: Any, tell: Any, has_ray: threading.Event) -> dict[str, Any]:
        has_ray.set()
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(RunFolder.of(config).stop_file.exists)
        raise error

    monkeypatch.setattr(trainer, "_run", run)
    with pytest.raises(ends_in):
        trainer.launch(small_config(tmp_path))


# --- workers, on a Ray that is there ----------------------------------------------------------------------------------


@pytest.mark.ray
def test_ranks_train_and_write_to_their_logs_alone(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["step"] == NUM_STEPS
    assert not summary["stopped"]
    assert read_rows(undisturbed)[-1]["step"] == NUM_STEPS
    assert {file.name for file in (undisturbed / "logs").glob("rank_*")} == {"rank_0.log", "rank_1.log"}
    assert not (undisturbed / "logs" / "restarts.log").exists()


@pytest.mark.ray
def test_a_mistake_found_by_a_worker_arrives_as_it_was(shared_ray: Any, tmp_path: Path) -> None:
    text = {"model__name": "transformer", "model__heads": 2, "data__name": "text", "data__files": [f"{tmp_path}/none.txt"]}
    config = crowded(small_config(tmp_path, **text))
    path = prepare_run(config)
    with pytest.raises(DataError) as error:
        fit(config)
    assert "none.txt" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (path / "logs" / "restarts.log").exists()  # it would be the same mistake


@pytest.mark.ray
@pytest.mark.thorough
def test_any_other_failure_names_its_rank_and_log_and_is_tried_twice(shared_ray: Any, tmp_path: Path) -> None:
    config = crowded(small_config(tmp_path))
    path = prepare_run(config)
    (path / "metrics.jsonl").mkdir()  # rank 0 cannot write it
    with pytest.raises(TrainingError, match=f"^worker 0 failed: IsADirectoryError: .*; see {path}/logs/rank_0.log.$"):
        fit(config)
    assert "IsADirectoryError" in (path / "logs" / "rank_0.log").read_text()
    assert (path / "logs" / "restarts.log").read_text().count("Restarting: worker 0 failed: IsADirectoryError") == 1


@pytest.mark.ray
def test_a_stop_before_training_begins_needs_no_step(shared_ray: Any, tmp_path: Path) -> None:
    config = crowded(small_config(tmp_path))
    path = prepare_run(config)
    (path / "stop").touch()
    assert fit(config) == {"stopped": True}
    assert not (path / "metrics.jsonl").exists()


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_one_ctrl_c_or_a_sigterm_saves_a_checkpoint_within_10_s_and_the_run_goes_on_later(tmp_path: Path) -> None:
    run, done = tmp_path / "run", 0
    prepared = words(tmp_path)
    (tmp_path / "numpy.py").write_text("raise RuntimeError('taken for the installed one')\n")  # not where commands import from
    # NOTE: `timeout`, when it ends or is ended itself, signals the command and then its process group: twice, and Ray, too.
    for stop, before in ((interrupt, ()), (terminate, ("timeout", "600"))):
        command = Command(tmp_path, *prepared, before=before)
        wait_until(lambda: command.reaches(run, done + 5))  # noqa: B023 - called at once
        stop(command)
        start = time.monotonic()
        status, errors = command.end()
        assert time.monotonic() - start < 10
        assert (status, errors) == (130, "")
        assert command.lines[-1] == "next  distcond train --config run/config.yaml\n"
        summary = json.loads((run / "summary.json").read_text())
        assert summary["stopped"]
        assert summary["step"] >= done + 5
        done = summary["step"]
        assert (run / "checkpoints" / f"step_{done:08d}").is_dir()

    prepare_run(override(load_config(run / "config.yaml"), {"train.max_steps": done + 10}))
    command = Command(tmp_path, *prepared)
    assert command.end() == (0, "")
    assert [line.split()[0] for line in command.lines[-3:]] == ["run", "best", "next"]
    steps = [row["step"] for row in read_rows(run) if "train/loss" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == done + 10


def interrupt(command: Command) -> None:
    """Ctrl-C: a terminal sends it to all processes of the group."""
    os.killpg(command.process.pid, signal.SIGINT)


def terminate(command: Command) -> None:
    command.process.send_signal(signal.SIGTERM)


@pytest.mark.ray
@pytest.mark.parametrize("moment", ["Ray", "2 workers"])
@pytest.mark.thorough
def test_a_sigterm_while_starting_ends_within_10_s(moment: str, tmp_path: Path) -> None:
    command = Command(tmp_path, *words(tmp_path))
    wait_until(lambda: command.says(f"waiting for {moment}"))
    time.sleep(1)
    command.says(f"waiting for {moment}")
    terminate(command)
    start = time.monotonic()
    assert command.end() == (130, "")
    assert time.monotonic() - start < 10
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.ray
@pytest.mark.slow  # a start of Ray; that a Ctrl-C is heard at all is tested above
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    command = Command(tmp_path, *words(tmp_path))
    wait_until(lambda: command.says("waiting for the first figures"))
    interrupt(command)
    wait_until(lambda: command.says("Stopping"))
    interrupt(command)
    start = time.monotonic()
    assert command.end() == (130, "")
    assert time.monotonic() - start < 2
    assert command.lines[-1] == "Stopped at once.\n"
