"""metrics.jsonl and its mirror; the wandb here is the real one, offline or before a server that never answers."""

import contextlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import psutil
import pytest

from distcond.tracking import CLOSE_TIMEOUT_S, Tracker, WandbRun
from distcond.tracking.tracker import ORPHAN_TIMEOUT_S
from tests.cluster.processes import is_alive, wait_until
from tests.helpers import HANG_S
from tests.tracking.pictures import SAMPLES, TREES, check_pictures
from tests.tracking.server import clean_environment, wandb_server

ROWS = [{"step": float(step), "train/loss": 1 / step, "perf/nan": math.nan} for step in range(1, 31)]
SLACK_S = 3.0
"What a busy machine may add to a bounded wait."


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
    """What the tracker has logged (pytest's own `caplog` is switched off, for its time)."""
    log, messages = logging.getLogger("distcond.tracking"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    yield messages
    log.removeHandler(handler)


@pytest.fixture
def patient_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrors outlive the run as long as a busy machine needs: for tests of what they leave, not of how soon they end."""
    monkeypatch.setattr("distcond.tracking.tracker.ORPHAN_TIMEOUT_S", 60)


@contextmanager
def silent_server() -> Iterator[dict[str, str]]:
    """A wandb server that accepts connections and says nothing, as environment variables: its address and a key."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "0" * 40}


@dataclass(frozen=True)
class HungRun:
    """What a run before a silent server did. times: start, 1000 rows logged, close called, closed."""

    times: list[float]
    status: int
    exit_s: float
    left: list[psutil.Process]
    "Its children that outlived it longer than they may."
    num_rows: int


def run_before_a_silent_server(folder: Path) -> HungRun:
    script = f"""
import json, sys, time
from pathlib import Path
import psutil
from distcond.tracking import Tracker, WandbRun
times = [time.monotonic()]
tracker = Tracker(Path({str(folder)!r}), WandbRun("some-id", "name", "project", "", [], {{}}), "auto", 0)
for step in range(1000):
    tracker.log({{"step": step, "loss": 0.5}})
times.append(time.monotonic())
while len(children := psutil.Process().children(recursive=True)) < 2:  # the mirror and wandb's service
    assert time.monotonic() < times[0] + {HANG_S}
    time.sleep(0.1)
times.append(time.monotonic())
tracker.close()
times.append(time.monotonic())
print(json.dumps([[child.pid for child in children], times]), flush=True)
"""
    with (
        silent_server() as variables,
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=clean_environment() | variables) as run,
    ):
        assert run.stdout is not None
        pids, times = json.loads(run.stdout.readline())
        printed = time.monotonic()
        status = run.wait(HANG_S)
        exit_s = time.monotonic() - printed
        left = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
                left.append(psutil.Process(pid))
        return HungRun(times, status, exit_s, wait_for_exit(left, ORPHAN_TIMEOUT_S + 2 * SLACK_S), len(rows_in(folder)))


@pytest.fixture(scope="module")
def hung_run(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Future[HungRun]]":
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run_before_a_silent_server, tmp_path_factory.mktemp("hung"))


def track(folder: Path, mode: str = "disabled", resume_step: int = 0, **options: Any) -> Tracker:
    run = WandbRun("some-id", "name", "project", "group", ["deep", "small"], {"model": {"depth": 3}})
    return Tracker(folder, run, mode, resume_step, **options)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def finished_run(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records by type of the only offline run, once wandb's own reader finds its end."""
    (run,) = wait_until(lambda: offline_runs(folder))
    # Of wandb's command line alone: what `wandb leet inspect` calls, without two seconds of imports each time.
    core = Path(sysconfig.get_path("purelib")) / "wandb" / "bin" / "wandb-core"
    command = [core, "leet", "inspect", "-json", "-no-observability", "-run-file", run]

    def read() -> dict[str, list[dict[str, Any]]]:
        records: dict[str, list[dict[str, Any]]] = {}
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
            record = json.loads(line)
            records.setdefault(record["type"], []).append(record[record["type"]])
        return records if "exit" in records else {}

    records: dict[str, list[dict[str, Any]]] = wait_until(read)
    return records


def mirrored_rows(records: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    items = [history["item"] for history in records["history"]]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]


def wait_for_exit(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that are still there."""
    # NOTE: not psutil.wait_procs, for which an orphan that nobody reaps is still there.
    deadline = time.monotonic() + timeout_s
    while (left := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_each_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = track(tmp_path)
    for number, row in enumerate(ROWS, 1):
        tracker.log(row)
        assert len(rows_in(tmp_path)) == number
    tracker.close()
    assert rows_in(tmp_path) == [{**row, "perf/nan": None} for row in ROWS]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(tmp_path: Path, value: float) -> None:
    tracker = track(tmp_path)
    tracker.log({"step": 1, "loss": value})
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_what_is_no_number_in_samples_and_trees_is_null(tmp_path: Path) -> None:
    tracker = track(tmp_path)
    tracker.log_samples(1, [{"input": "a", "loss": math.nan, "losses": [1.0, math.inf]}])
    tracker.log_trees(1, [{"layer": "a", "nodes": {"norm": (math.inf, 2.0)}}])
    tracker.close()
    samples, trees = (json.loads((tmp_path / "eval" / name).read_text()) for name in ("samples.jsonl", "trees.jsonl"))
    assert samples == {"step": 1, "samples": [{"input": "a", "loss": None, "losses": [1.0, None]}]}
    assert trees == {"step": 1, "layers": [{"layer": "a", "nodes": {"norm": [None, 2.0]}}]}


@pytest.mark.parametrize("resume_step", [0, 1, 17, 30, 99])
@pytest.mark.parametrize("torn", ["", '{"step": 3', '{"step": 3, "train/lo'])
def test_rows_after_the_checkpoint_are_cut_and_a_torn_one_is_forgiven(tmp_path: Path, resume_step: int, torn: str) -> None:
    kept = "".join(json.dumps({"step": step, "old": 1}) + "\n" for step in range(1, 31))
    (tmp_path / "metrics.jsonl").write_text(kept + torn)
    tracker = track(tmp_path, resume_step=resume_step)
    tracker.log({"step": 1000})
    tracker.close()
    assert [row["step"] for row in rows_in(tmp_path)] == [*range(1, min(resume_step, 30) + 1), 1000]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_row_without_its_newline_is_kept_apart_from_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')
    tracker = track(tmp_path, resume_step=1)
    tracker.log({"step": 2})
    tracker.close()
    assert rows_in(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("mode", "variable"), [("disabled", ""), ("auto", "disabled")])
def test_disabled_starts_nothing(tmp_path: Path, mode: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    before = set(psutil.Process().children())
    tracker = track(tmp_path, mode)
    assert set(psutil.Process().children()) <= before
    tracker.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.usefixtures("patient_mirror")
def test_an_offline_run_has_every_row_and_its_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = track(tmp_path, "auto")
    for row in ROWS[:20]:
        if row["step"] == 10:
            tracker.log_samples(10, SAMPLES)
            tracker.log_trees(10, TREES)
        tracker.log(row)
    wait_until(lambda: offline_runs(tmp_path))
    for row in ROWS[20:]:
        tracker.log(row)
    tracker.close()
    assert capfd.readouterr() == ("", "")
    assert "wandb" not in sys.modules

    records = finished_run(tmp_path)
    rows = mirrored_rows(records)
    media = {key: rows[9].pop(key) for key in list(rows[9]) if key.startswith("val/")}
    kinds = {"val/samples._type": "table-file", "val/computation._type": "html-file", "val/tree._type": "html-file"}
    assert {key: value for key, value in media.items() if key.endswith("_type")} == kinds
    assert rows == [{**row, "perf/nan": "NaN"} for row in ROWS]
    shown = [next(tmp_path.glob(f"wandb/offline-run-*/files/media/html/val/{name}_*.html")) for name in ("computation", "tree")]
    check_pictures(*(file.read_text() for file in shown))
    assert records["exit"][0]["exit_code"] == 0
    assert records["metric"] == [{"glob_name": "*", "options": ANY, "step_metric": "step"}]
    (run,) = records["run"]
    assert (run["run_id"], run["project"], run["run_group"]) == ("some-id", "project", "group")
    assert run["tags"] == ["deep", "small"]
    assert run["display_name"] == "name" and run["config"]["update"]["model"] == {"depth": 3}


@pytest.mark.thorough
def test_a_resumed_run_mirrors_its_own_rows_and_a_killed_one_what_it_had(tmp_path: Path) -> None:
    script = f"""
import os, time
from pathlib import Path
from distcond.tracking import Tracker, WandbRun
folder, deadline = Path({str(tmp_path)!r}), time.monotonic() + {HANG_S}
tracker = Tracker(folder, WandbRun("some-id", "name", "project", "", [], {{}}), "offline", 20)
while not list(folder.glob("wandb/offline-run-*/*.wandb")):  # or the mirror would start in the seconds it has to end
    assert time.monotonic() < deadline
    time.sleep(0.05)
tracker.log({{"step": 21, "loss": 0.5}})
tracker.log({{"step": 22, "loss": 0.25}})
os.kill(os.getpid(), {signal.SIGKILL})
"""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 31)))
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert [row["step"] for row in rows_in(tmp_path)] == list(range(1, 23))
    records = finished_run(tmp_path)
    assert mirrored_rows(records) == [{"step": 21, "loss": 0.5}, {"step": 22, "loss": 0.25}]
    assert records["exit"][0]["exit_code"] == 1


@pytest.mark.parametrize(("mode", "key"), [("online", ""), ("auto", "too-short")])
@pytest.mark.usefixtures("patient_mirror")
@pytest.mark.thorough
def test_no_way_online_is_one_warning_and_an_offline_run(
    tmp_path: Path, mode: str, key: str, monkeypatch: pytest.MonkeyPatch, warnings_logged: list[str]
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    told: list[str] = []
    tracker = track(tmp_path, mode, note=told.append)
    tracker.log({"step": 1, "loss": 0.5})
    wait_until(lambda: offline_runs(tmp_path))
    tracker.close()
    assert mirrored_rows(finished_run(tmp_path)) == [{"step": 1, "loss": 0.5}]
    (message,) = told if mode == "online" else warnings_logged
    assert message.startswith("wandb is offline (") and f"distcond sync {tmp_path}" in message


@pytest.mark.thorough
def test_a_server_that_hangs_holds_up_neither_the_run_nor_its_exit(hung_run: "Future[HungRun]") -> None:
    """wandb in the same process would hold up the exit for 9 s and more."""
    run = hung_run.result(2 * HANG_S)
    start, logged, closing, closed = run.times
    assert logged - start < SLACK_S
    assert CLOSE_TIMEOUT_S <= closed - closing < CLOSE_TIMEOUT_S + SLACK_S
    assert run.status == 0 and run.exit_s < SLACK_S
    assert not run.left  # wandb's service misses its parent after some 2 s
    assert run.num_rows == 1000


@pytest.mark.thorough
def test_a_mirror_that_is_stopped_holds_up_nothing(tmp_path: Path) -> None:
    before = psutil.Process().children()
    start = time.monotonic()
    tracker = track(tmp_path, "offline")
    (mirror,) = set(psutil.Process().children()) - set(before)
    mirror.suspend()
    try:
        for step in range(1000):
            tracker.log({"step": step, "x" * 1000: 0.5})  # together more than a pipe holds
        assert time.monotonic() - start < SLACK_S
        start = time.monotonic()
        tracker.close()
        assert time.monotonic() - start < CLOSE_TIMEOUT_S + SLACK_S
    finally:
        mirror.kill()
    assert not wait_for_exit([mirror], HANG_S)
    assert len(rows_in(tmp_path)) == 1000


@pytest.mark.thorough
def test_a_mirror_that_dies_holds_up_nothing(tmp_path: Path) -> None:
    before = psutil.Process().children()
    tracker = track(tmp_path, "offline")
    (mirror,) = set(psutil.Process().children()) - set(before)
    mirror.kill()
    wait_until(lambda: not psutil.pid_exists(mirror.pid))
    tracker.log({"step": 1})
    start = time.monotonic()
    tracker.close()
    assert time.monotonic() - start < SLACK_S
    assert rows_in(tmp_path) == [{"step": 1}]


@pytest.mark.usefixtures("patient_mirror")
@pytest.mark.slow  # wandb itself takes 20 s to give up
def test_a_server_that_hangs_leaves_a_complete_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_logged: list[str]
) -> None:
    with silent_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        tracker = track(tmp_path, "auto")
        for step in range(1, 201):
            tracker.log({"step": step})
            time.sleep(0.1)
        wait_until(lambda: offline_runs(tmp_path))
        tracker.close()
    assert mirrored_rows(finished_run(tmp_path)) == rows_in(tmp_path)
    (message,) = warnings_logged
    assert message.startswith("wandb is offline (")


@pytest.mark.usefixtures("patient_mirror")
@pytest.mark.thorough
def test_an_online_run_has_every_row_and_its_samples_and_going_on_continues_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_logged: list[str]
) -> None:
    with wandb_server() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        for start in (0, 20):  # the second one goes on from a checkpoint at 20, after a crash at 30
            tracker = track(tmp_path, "auto", resume_step=start)
            for step in range(start + 10, start + 31, 10):
                tracker.log({"step": step, "loss": 1 / step})
                if step % 20 == 0:
                    tracker.log_samples(step, SAMPLES)
                    tracker.log_trees(step, TREES)
                    tracker.log({"step": step, "val/loss": start + step})
            wait_until(lambda number=1 + start // 20: server.num_starts == number)
            tracker.close()
            wait_until(lambda last=start + 30: sent_step(tmp_path) == last)
        media = {"val/samples": ANY, "val/computation": ANY, "val/tree": ANY}
        assert server.rows("some-id") == [
            {"step": 10, "loss": 0.1},
            {"step": 20, "loss": 0.05, "val/loss": 20, **media},
            {"step": 30, "loss": 1 / 30},  # and not once more
            {"step": 40, "loss": 0.025, "val/loss": 60, **media},
            {"step": 50, "loss": 0.02},
        ]
        run = server.runs["some-id"]
        assert (run["displayName"], run["groupName"], run["tags"]) == ("name", "group", ["deep", "small"])
        assert '"model":{"value":{"depth":3}}' in run["config"]
        tables = [json.loads(body) for path, body in server.files.items() if "/media/table/val/samples" in path]
        pages = [
            next(body.decode() for path, body in server.files.items() if f"/media/html/val/{name}" in path)
            for name in ("computation", "tree")
        ]
    assert tables[0]["columns"] == ["example", "target", "steps", "loss"]
    assert tables[0]["data"][0] == [0, "a<", "[1, 3]", "[9.0, 0.5]"]
    check_pictures(*pages)
    assert not warnings_logged
    assert [row["step"] for row in rows_in(tmp_path)] == [10, 20, 20, 30, 40, 40, 50]
    for name in ("samples", "trees"):
        kept = [json.loads(line)["step"] for line in (tmp_path / "eval" / f"{name}.jsonl").read_text().splitlines()]
        assert kept == [20, 40]


@pytest.mark.thorough
def test_a_server_that_falls_silent_holds_up_nothing_and_counts_as_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wandb_server() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        others = set(psutil.Process().children(recursive=True))
        tracker = track(tmp_path, "auto")
        wait_until(lambda: server.runs)
        server.is_silent.set()
        start = time.monotonic()
        for step in range(1, 200):
            tracker.log_samples(step, [{"example": 0, "input": "a" * 1000}])
            tracker.log({"step": step, "val/loss": 0.5})
        assert time.monotonic() - start < SLACK_S
        own = set(psutil.Process().children(recursive=True)) - others
        start = time.monotonic()
        tracker.close()
        assert time.monotonic() - start < CLOSE_TIMEOUT_S + SLACK_S
        assert len(own) >= 2 and not wait_for_exit(list(own), ORPHAN_TIMEOUT_S + 2 * SLACK_S)
    assert sent_step(tmp_path) is None and len(rows_in(tmp_path)) == 199


def sent_step(folder: Path) -> int | None:
    file = folder / "wandb" / "sent.json"
    return next(iter(json.loads(file.read_text())["sent"].values())) if file.exists() else None
