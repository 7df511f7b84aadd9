"""Workers that die, or freeze, at any time are replaced. Real processes on a real Ray, which train nothing."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from distcond.cluster.controller import Job, Outcome, start_controller
from distcond.cluster.policy import Ask
from distcond.errors import ClusterError, RunError, TrainingError
from tests.cluster.processes import TIMEOUT_S, is_alive, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]

HANG_TIMEOUT_S = 3.0


def make_job(folder: Path, **changes: Any) -> Job:
    """Two workers, which take all there is, and work until folder/finish appears; each leaves folder/<process number>."""

    def train() -> dict[str, Any]:
        (folder / str(os.getpid())).touch()
        while not (folder / "finish").exists():
            time.sleep(0.02)
        return {"step": 7}

    parts = {
        "train": train,
        "join": lambda address, port, store: None,
        "ask": Ask(2, 1, 0),
        "max_failures": 3,
        "hang_timeout_s": 60.0,
        "wait_for_ranks": lambda: None,
        "logs": folder,
        "started_file": folder / "started",
        "restarts_file": folder / "restarts",
        "metrics": folder / "metrics",
    }
    return Job(**{**parts, **changes})


def run_job(job: Job, meanwhile: Callable[[], None]) -> Outcome:
    controller, outcome = start_controller(job)
    try:
        meanwhile()
        end: Outcome = ray.get(outcome, timeout=TIMEOUT_S)
        return end
    finally:
        ray.kill(controller)


def workers_of(folder: Path) -> set[psutil.Process]:
    workers = set()
    for file in folder.iterdir():
        with contextlib.suppress(ValueError, psutil.NoSuchProcess):  # another file, or one of a worker that has ended
            workers.add(psutil.Process(int(file.name)))
    return workers


def test_a_frozen_worker_is_found_in_time_and_replaced(tmp_path: Path) -> None:
    def freeze_one() -> None:
        first = wait_until(lambda: (found := workers_of(tmp_path)) and len(found) == 2 and found)
        frozen = first.pop()
        start = time.monotonic()
        frozen.suspend()
        wait_until(lambda: (tmp_path / "restarts").exists())
        assert HANG_TIMEOUT_S - 0.5 < time.monotonic() - start < HANG_TIMEOUT_S + 10  # from when it was last asked
        wait_until(lambda: len(workers_of(tmp_path) - first - {frozen}) == 2)
        assert time.monotonic() - start < HANG_TIMEOUT_S + 30
        wait_until(lambda: not is_alive(frozen), timeout_s=5)
        (tmp_path / "finish").touch()

    assert run_job(make_job(tmp_path, hang_timeout_s=HANG_TIMEOUT_S), freeze_one).summary == {"step": 7}
    line = (tmp_path / "restarts").read_text()
    assert line in {f"Restarting: worker {rank} did not answer (failure 1 of 3 allowed).\n" for rank in (0, 1)}


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="frozen", marks=pytest.mark.slow)]
)
def test_a_worker_that_is_gone_before_training_begins_gives_its_cores_back(number: int, tmp_path: Path) -> None:
    def join(address: str, port: int, store: Path) -> None:
        (tmp_path / "finish").touch()
        try:
            (tmp_path / "first").mkdir()
        except FileExistsError:
            return
        os.kill(os.getpid(), number)

    start = time.monotonic()
    assert run_job(make_job(tmp_path, join=join, hang_timeout_s=HANG_TIMEOUT_S), lambda: None).summary == {"step": 7}
    assert time.monotonic() - start < HANG_TIMEOUT_S + 40
    assert "the workers could not be started (failure 1 of 3 allowed)" in (tmp_path / "restarts").read_text()


def test_what_another_attempt_would_not_change_is_the_last_word(tmp_path: Path) -> None:
    def train() -> dict[str, Any]:
        raise TrainingError("no finite loss")

    outcome = run_job(make_job(tmp_path, train=train), lambda: None)
    assert isinstance(outcome.last_word, TrainingError)
    assert str(outcome.last_word) == "no finite loss"
    assert not (tmp_path / "restarts").exists()


def test_an_old_writer_that_does_not_end_is_the_users_to_end(tmp_path: Path) -> None:
    def never() -> None:
        raise RunError("somebody writes")

    outcome = run_job(make_job(tmp_path, wait_for_ranks=never), lambda: None)
    assert str(outcome.last_word) == "somebody writes"
    assert not (tmp_path / "restarts").exists()


def test_what_a_rank_finds_out_before_training_is_the_last_word(tmp_path: Path) -> None:
    def join(address: str, port: int, store: Path) -> None:
        raise ClusterError("not shared")

    outcome = run_job(make_job(tmp_path, join=join), lambda: None)
    assert type(outcome.last_word) is ClusterError
    assert str(outcome.last_word) == "not shared"
    assert not (tmp_path / "restarts").exists()


MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.mark.skipif(not os.access(MEMORY / "cgroup.procs", os.W_OK), reason="needs root and a memory controller (cgroup v1)")
def test_a_worker_that_the_kernel_ends_for_want_of_memory_is_told_so(tmp_path: Path) -> None:
    limited = MEMORY / f"distcond-test-{os.getpid()}"
    limited.mkdir()
    (limited / "memory.limit_in_bytes").write_text(str(100 * 10**6))

    def train() -> dict[str, Any]:
        (limited / "cgroup.procs").write_text(str(os.getpid()))
        return {"bytes": len(b"a" * 10**9)}

    try:
        outcome = run_job(make_job(tmp_path, train=train), lambda: None)
    finally:
        wait_until(lambda: not (limited / "cgroup.procs").read_text())
        limited.rmdir()
    assert any("ran out of memory: the kernel ended a process of its machine" in line for line in outcome.failures.values())
    [line] = (tmp_path / "restarts").read_text().splitlines()  # not tried for ever
    assert "ran out of memory: the kernel ended a process of its machine; lower data.global_batch_size" in line
