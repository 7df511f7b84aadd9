"""The run folder: one process writes to it, and only the run that it holds is continued in it."""

import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from distcond.compose import override
from distcond.config import Config
from distcond.errors import RunError
from distcond.train.run_folder import MAY_CHANGE, RunFolder, check_continues, write_json
from tests.helpers import HANG_S, small_config

HOLDER = """
import sys
from pathlib import Path
from distcond.train.run_folder import RunFolder
with getattr(RunFolder(Path(sys.argv[1])), sys.argv[2])():
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, how: str = "locked") -> subprocess.Popen[str]:
    """Another process that holds the folder until its input ends."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), how], **pipes)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    return holder


def test_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with hold(tmp_path) as holder:
        with pytest.raises(RunError) as refused, RunFolder(tmp_path).locked():
            pass
        holder.communicate()
    assert f"process {holder.pid} on " in str(refused.value) and "run.name" in str(refused.value)
    with RunFolder(tmp_path).locked():  # it is free as soon as its holder is gone
        pass


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with hold(tmp_path) as holder:
        holder.kill()
    assert f"process {holder.pid} on " in (tmp_path / "lock").read_text()  # it had no time to tidy up
    with RunFolder(tmp_path).locked():
        assert f"process {holder.pid} on " not in (tmp_path / "lock").read_text()


def test_json_holds_no_number_that_json_does_not_know(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"nll": math.inf, "best": {"value": 1.5, "all": [math.nan, 2]}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"nll": None, "best": {"value": 1.5, "all": [None, 2]}}


def test_json_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "folder", {})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_other_settings_are_told_as_they_are_typed(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    other = override(config, {"model.halting.kind": "fixed", "model.width": 32})
    with pytest.raises(
        RunError, match=rf"model.halting.kind=fixed \(was {config.model.halting.kind.value}\); model.width=32 \(was"
    ):
        check_continues(config, other, tmp_path)


@pytest.mark.thorough
def test_ranks_of_a_killed_command_are_waited_for_and_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.wait_for_ranks(0)  # there was none yet
    with hold(tmp_path, "writing") as first, hold(tmp_path, "writing") as second:
        with pytest.raises(RunError) as refused:
            folder.wait_for_ranks(0.2)
        line = str(refused.value)
        assert f"process {first.pid} on " in line and f"process {second.pid} on " in line and "\n" not in line
        first.kill()
        start = time.monotonic()
        threading.Timer(0.3, second.kill).start()
        folder.wait_for_ranks(HANG_S)
        assert 0.2 < time.monotonic() - start < HANG_S / 4
    with hold(tmp_path, "writing") as third:
        with pytest.raises(RunError) as refused:
            folder.wait_for_ranks(0)
        assert f"process {third.pid} on " in str(refused.value) and f"process {first.pid} on " not in str(refused.value)
        third.kill()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train__max_steps", 99),
        ("train__log_every", 3),
        ("checkpoint__every", 7),
        ("tracking__mode", "offline"),
        ("cluster__num_workers", 4),
        ("cluster__expert_parallel_size", 1),
        ("optim__zero_stage", 3),
        ("data__cache_dir", "/elsewhere"),
    ],
)
def test_length_logging_workers_and_stage_may_change(key: str, value: object) -> None:
    old, new = small_config("runs"), small_config("runs", **{key: value})
    check_continues(old, new, Path("runs/run"))


def test_other_settings_may_not_change_and_are_all_named() -> None:
    old = small_config("runs")
    new = small_config("runs", optim__lr=0.5, model__tree__depth=4, train__max_steps=99)
    with pytest.raises(RunError) as refused:
        check_continues(old, new, Path("runs/run"))
    line = str(refused.value)
    assert "optim.lr=0.5 (was 0.01)" in line and "model.tree.depth=4 (was 3)" in line
    assert "max_steps" not in line and "runs/run" in line and "\n" not in line
    assert "go on with its own by `distcond train --config runs/run/config.yaml`" in line


def test_the_run_that_a_run_was_started_from_may_not_change() -> None:
    old, new = small_config("runs"), small_config("runs", train__init_from="/runs/dense")
    with pytest.raises(RunError, match=r"train.init_from='/runs/dense' \(was ''\)"):
        check_continues(old, new, Path("runs/run"))


def test_what_decides_results_may_not_change() -> None:
    """Whatever is added to these sections of the configuration."""
    free = {prefix.rstrip(".") for prefix in MAY_CHANGE}
    assert {section.name for section in fields(Config)} - free == {"seed", "model", "data", "optim"}


def test_json_is_written_in_one_move(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"step": 1})
    with pytest.raises(TypeError):
        write_json(file, {"step": object()})
    assert json.loads(file.read_text()) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
