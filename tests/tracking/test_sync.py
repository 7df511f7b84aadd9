"""`distcond sync` with the real wandb before a server of this machine."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import ANY

import pytest

from distcond.cli import main
from distcond.compose import save_config
from distcond.config import Config
from distcond.tracking import Tracker, WandbRun
from distcond.train.run_folder import RunFolder
from tests.cluster.processes import wait_until
from tests.helpers import changed
from tests.tracking.server import WandbServer, clean_environment, wandb_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    forget_wandb(monkeypatch, tmp_path)
    with wandb_server() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        yield server


def forget_wandb(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(folder / "no-netrc"))


def make_run(folder: Path, steps: range, **changes: object) -> Path:
    """A run with a row a step, and at every tenth step a validation with samples; more `steps` make it grow."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval").mkdir(exist_ok=True)
    tracking = {"tracking__project": "trees", "tracking__group": "g", "tracking__tags": ["deep"], "tracking__mode": "offline"}
    save_config(changed(Config(), run__name=folder.name, **{**tracking, **changes}), folder / "config.yaml")
    layer = {"layer": "up", "depth": 3, "trees": 1, "tokens": 4, "nodes": [[0, 0, 0, 0, 4, 1.5]]}
    files = [folder / name for name in ("metrics.jsonl", "eval/samples.jsonl", "eval/trees.jsonl")]
    with files[0].open("a") as rows, files[1].open("a") as samples, files[2].open("a") as trees:
        for step in steps:
            rows.write(json.dumps({"step": step, "train/loss": 1 / step}) + "\n")
            if step % 10 == 0:
                samples.write(json.dumps({"step": step, "samples": [{"example": 0, "input": "a", "steps": [1, 2]}]}) + "\n")
                trees.write(json.dumps({"step": step, "layers": [layer]}) + "\n")
                rows.write(json.dumps({"step": step, "val/bpb": 2.5, "perf/nan": None}) + "\n")
    return folder


def run_id(folder: Path) -> str:
    return str(json.loads((folder / "wandb" / "sent.json").read_text())["id"])


@pytest.mark.thorough
def test_what_has_not_been_sent_is_sent_once_and_a_run_that_grew_goes_on(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "first", range(1, 21))
    assert main(["sync", str(folder)]) == 0
    name = run_id(folder)
    assert capsys.readouterr().out == f"{folder}: 22 rows sent to {name}\n"
    table = {"val/bpb": 2.5, "perf/nan": ANY, "val/samples": ANY, "val/tree": ANY}
    sent = [{"step": step, "train/loss": 1 / step} | (table if step % 10 == 0 else {}) for step in range(1, 26)]
    assert server.rows(name) == sent[:20]
    run = server.runs[name]
    assert (run["displayName"], run["project"], run["groupName"], run["tags"]) == ("first", "trees", "g", ["deep"])
    assert '"seed":{"value":0}' in run["config"]
    tables = [json.loads(body) for path, body in server.files.items() if "/media/table/val/samples" in path]
    pages = [body for path, body in server.files.items() if "/media/html/val/tree" in path]
    assert len(pages) == 2 and all(b"<title>root: 4 tokens, 100%, norm 1.5</title>" in body for body in pages)
    assert tables == 2 * [{"columns": ["example", "input", "steps"], "data": [[0, "a", "[1, 2]"]]}]

    asked = server.num_requests
    assert main(["sync", str(folder)]) == 0
    assert capsys.readouterr().out == "nothing to send of 1 run\n"
    assert server.num_requests == asked

    make_run(folder, range(21, 26))
    moved = folder.rename(tmp_path / "moved")
    assert main(["sync", str(moved)]) == 0
    assert capsys.readouterr().out == f"{moved}: 5 rows sent to {name}\n"
    assert server.rows(name) == sent and list(server.runs) == [name]


@pytest.mark.thorough
def test_every_run_below_a_folder_is_sent_unless_it_does_not_track(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = make_run(tmp_path / "one", range(1, 3)), make_run(tmp_path / "sweep" / "000-a", range(1, 4))
    make_run(tmp_path / "silent", range(1, 3), tracking__mode="disabled")
    assert main(["sync", f"run.dir={tmp_path}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{one}: 2 rows sent to {run_id(one)}", f"{two}: 3 rows sent to {run_id(two)}"]
    assert sorted(server.runs) == sorted([run_id(one), run_id(two)])


@pytest.mark.thorough
def test_the_last_step_of_a_run_that_trains_has_to_wait(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "first", range(1, 4))
    with RunFolder(folder).locked():
        assert main(["sync", str(folder)]) == 0
    assert [row["step"] for row in server.rows(run_id(folder))] == [1, 2]
    assert main(["sync", str(folder)]) == 0
    assert [row["step"] for row in server.rows(run_id(folder))] == [1, 2, 3]


@pytest.mark.thorough
def test_a_run_that_trains_offline_can_be_sent_and_one_that_sends_itself_is_left_alone(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "first", range(1, 4))
    run = WandbRun("some-id", "name", "project", "", [], {})
    tracker = Tracker(folder, run, "offline", resume_step=3)
    wait_until(lambda: list(folder.glob("wandb/offline-run-*/*.wandb")))
    assert main(["sync", str(folder)]) == 0
    assert f"{folder}: 3 rows sent" in capsys.readouterr().out
    tracker.close()
    tracker = Tracker(folder, run, "auto", resume_step=3)
    wait_until(lambda: "some-id" in server.runs)
    make_run(folder, range(4, 6))
    assert main(["sync", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: is being sent already\n"
    tracker.close()


@pytest.mark.thorough
def test_a_server_that_never_answers_is_one_line_and_nothing_counts_as_sent(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "first", range(1, 4))
    server.is_silent.set()
    start = time.monotonic()
    assert main(["sync", str(folder)]) == 1
    assert time.monotonic() - start < 30
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"{folder} could not be sent to {server.variables['WANDB_BASE_URL']} (" in said.err and "nothing counts" in said.err
    assert not (folder / "wandb" / "sent.json").exists()


@pytest.mark.thorough
def test_a_server_that_refuses_rows_is_one_line_and_nothing_counts_as_sent(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "first", range(1, 4))
    server.refuses = True
    assert main(["sync", str(folder)]) == 1
    assert "could not be sent" in capsys.readouterr().err
    assert not (folder / "wandb" / "sent.json").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["RUN"], "there is no wandb key for http://127.0.0.1:9; set WANDB_API_KEY"),
    (["DAMAGED"], "metrics.jsonl, line 4, is damaged (it is no JSON object with a step); remove that line"),
    (["nowhere"], "nowhere holds no run with metrics; give the folder of a run"),
    (["RUN", "run.dir=a"], "needed is either folders of runs, or one run.dir=FOLDER"),
    (["--al"], "unrecognized arguments: --al; did you mean --help"),
])  # fmt: skip
@pytest.mark.thorough
def test_a_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_wandb(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folders = {"RUN": str(make_run(tmp_path / "first", range(1, 4)))}
    folders["DAMAGED"] = str(make_run(tmp_path / "second", range(1, 4)))
    with (tmp_path / "second" / "metrics.jsonl").open("a") as rows:
        rows.write("garbage\n")
    assert main(["sync", *(folders.get(word, word) for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
