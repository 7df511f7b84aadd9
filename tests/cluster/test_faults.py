"""Whole runs whose processes are killed, stopped and starved: each ends as the undisturbed one, bit for bit, or in one line."""

import contextlib
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from distcond.cluster.policy import LESS_MEMORY
from distcond.cluster.trainer import fit, prepare_run
from distcond.compose import load_config, save_config
from distcond.errors import TrainingError
from distcond.train.run_folder import RunFolder
from tests.cluster.processes import (
    EVERY,
    NUM_STEPS,
    Command,
    assert_same_end,
    faulty_config,
    find_processes,
    find_workers,
    last_step,
    processes_of,
    read_rows,
    signal_all,
    wait_until,
    words,
)
from tests.helpers import changed, sealers_below, small_config

pytestmark = pytest.mark.ray

RESTART_S = 30.0
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


def resumed_at(run: Path) -> list[int]:
    """Steps at which rank 0 found its run, at each of its starts but the first."""
    return [int(step) for step in re.findall(r"Continuing .* from step (\d+)", (run / "logs" / "rank_0.log").read_text())]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_worker_killed_at_a_random_step_costs_an_interval_and_30_s(seed: int, undisturbed: Path, tmp_path: Path) -> None:
    config = faulty_config(tmp_path)
    path, draw, before = prepare_run(config), random.Random(seed), set(find_workers())
    moment, victim = draw.randrange(1, NUM_STEPS // 2), draw.randrange(2)
    times: dict[str, float] = {}

    def kill() -> None:
        wait_until(lambda: last_step(path) >= moment)
        sorted(set(find_workers()) - before, key=lambda process: process.pid)[victim].kill()
        times["step"] = last_step(path)
        start = time.monotonic()
        wait_until(lambda: (path / "logs" / "restarts.log").exists())
        times["noticed_s"] = time.monotonic() - start
        wait_until(lambda: last_step(path) > times["step"] + 1)  # and what was repeated is made up for
        times["restart_s"] = time.monotonic() - start

    killer = threading.Thread(target=kill)
    killer.start()
    fit(config)
    killer.join()
    print(f"seed {seed}: {times} resumed at {resumed_at(path)}")
    assert times["restart_s"] < RESTART_S
    repeated = times["step"] - ([*resumed_at(path), 0][0])
    print(f"repeated {repeated:g} steps, trained on after {times['restart_s']:.1f} s")
    line = f"Restarting: worker {{}} lost (failure 1 of {config.cluster.max_failures} allowed).\n"
    assert (path / "logs" / "restarts.log").read_text() in {line.format(rank) for rank in (0, 1)}
    assert repeated <= EVERY
    assert_same_end(path, undisturbed)


@pytest.mark.thorough
def test_a_checkpoint_outlives_the_workers_that_have_begun_it(shared_ray: Any, tmp_path: Path) -> None:
    config = faulty_config(tmp_path, model__width=1024, train__max_steps=12, train__eval_every=12, checkpoint__every=5)
    path, before, found = prepare_run(config), set(find_workers()), []

    def kill() -> None:
        """One worker, whereupon Ray kills the other, when all files of a checkpoint have been begun."""
        wait_until(lambda: last_step(path) >= 1)
        worker = (set(find_workers()) - before).pop()
        files = wait_until(lambda: list(path.glob("checkpoints/.step_00000010.*.tmp/*.safetensors"))[2:], poll_s=0.001)
        worker.kill()
        found.append((path / "checkpoints/step_00000010").exists() or not files[0].parent.exists())

    killer = threading.Thread(target=kill)
    killer.start()
    fit(config)
    killer.join()
    assert resumed_at(path) == [10]
    assert found == [False]  # it was being written
    wait_until(lambda: not sealers_below(path))  # each ends after its rank


@pytest.mark.slow  # 38 s; a frozen worker is found in tests/cluster/test_group.py, too
def test_a_run_that_stands_still_is_started_again(undisturbed: Path, tmp_path: Path) -> None:
    config = changed(faulty_config(tmp_path), cluster__hang_timeout_s=10.0)
    path, before = prepare_run(config), set(find_processes("_DataActor"))
    times = []

    def freeze_data_actor() -> None:
        wait_until(lambda: last_step(path) >= 15)
        (set(find_processes("_DataActor")) - before).pop().suspend()
        times.append(time.monotonic())
        wait_until(lambda: (path / "logs" / "restarts.log").exists())
        times.append(time.monotonic())

    freezer = threading.Thread(target=freeze_data_actor)
    freezer.start()
    fit(config)
    freezer.join()
    assert 10 - 1 < times[1] - times[0] < 10 + 10
    line = (path / "logs" / "restarts.log").read_text()
    assert re.fullmatch(r"Restarting: worker [01, ]+ stood still: no batch asked for in 10 s \(failure 1 of 3 allowed\).\n", line)
    logs = [(path / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
    assert all("Thread 0x" in log for log in logs)  # where each rank stood: one waits for a batch, the other for that one
    assert any("feeder.py" in log for log in logs)
    assert_same_end(path, undisturbed)
    wait_until(lambda: set(find_processes("_DataActor")) <= before, timeout_s=5)


def start(folder: Path, **changes: Any) -> Command:
    prepare_run(faulty_config(folder, **changes))
    return Command(folder, "--config", "run/config.yaml")


@pytest.mark.thorough
def test_the_driver_and_then_every_process_killed_the_same_command_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = start(tmp_path)
    wait_until(lambda: command.reaches(run, 15))
    command.process.kill()
    assert command.end(left_s=5) == (-signal.SIGKILL, "")

    command = Command(tmp_path, "--config", "run/config.yaml")
    wait_until(lambda: command.reaches(run, 45))
    signal_all([command.process, *command.process.children(recursive=True), *sealers_below(run)])
    assert command.end(left_s=5) == (-signal.SIGKILL, "")

    command = Command(tmp_path, "--config", "run/config.yaml")
    assert command.end() == (0, "")
    assert len(resumed_at(run)) == 2
    assert_same_end(run, undisturbed)


@pytest.mark.slow  # a start of Ray or two; what it rests on is tested more cheaply, too
def test_a_frozen_rank_does_not_outlive_a_killed_driver(tmp_path: Path) -> None:
    command = Command(tmp_path, *words(tmp_path))
    wait_until(lambda: command.reaches(tmp_path / "run", 2))
    for process in processes_of("RayTrainWorker", command.started):
        process.suspend()
    command.process.kill()
    command.end(left_s=5)
    with RunFolder(tmp_path / "run").locked():
        RunFolder(tmp_path / "run").wait_for_ranks(0)


@pytest.mark.slow  # a start of Ray or two; what it rests on is tested more cheaply, too
def test_a_sigterm_to_all_processes_ends_in_a_line_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    command = start(tmp_path, train__max_steps=10**6)
    run = tmp_path / "run"
    wait_until(lambda: command.reaches(run, EVERY + 2))
    signal_all([command.process, *command.process.children(recursive=True), *sealers_below(run)], signal.SIGTERM)
    assert command.end(left_s=5) == (130, "")
    assert "Stopped without a checkpoint, for Ray's processes were ended too.\n" in command.lines
    assert command.lines[-1] == "next  distcond train --config run/config.yaml\n"


@pytest.mark.slow  # a start of Ray or two; what it rests on is tested more cheaply, too
def test_a_batch_that_memory_cannot_hold_is_told_in_a_line_and_not_tried_for_ever(shared_ray: Any, tmp_path: Path) -> None:
    config = faulty_config(tmp_path, data__num_bits=1000, data__global_batch_size=10**8)
    path = prepare_run(config)
    with pytest.raises(TrainingError) as failed:
        fit(config)
    line = str(failed.value)
    assert re.match(r"worker \d(, \d)? ran out of memory: [\d.]+ [GT]iB for an array with shape \(\d+, \d+\) asked for in ", line)
    assert LESS_MEMORY in line and "\n" not in line
    assert len((path / "logs" / "restarts.log").read_text().splitlines()) == 1


def full_beyond(num_bytes: int) -> dict[str, str]:
    """Environment of a Ray that takes its node for full once so many bytes are in use, and then ends what is largest."""
    share = num_bytes / psutil.virtual_memory().total
    return {"RAY_memory_usage_threshold": f"{share:.4f}", "RAY_memory_monitor_refresh_ms": "100"}


@pytest.mark.slow  # a minute and some GB
def test_a_worker_that_ray_ends_for_want_of_memory_is_told_in_a_line_and_tried_once_more(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    settings = ["run.name=run", "tracking.mode=disabled", "train.max_steps=5", "data.global_batch_size=4096"]  # some GB a worker
    command = Command(tmp_path, *settings, **full_beyond(memory.total - memory.available + 3 * 2**30))
    status, errors = command.end(left_s=10)
    assert status == 1, command.lines
    assert re.match(r"distcond: failed: worker \d(, \d)? ran out of memory: its node is full, so that Ray ended it; ", errors)
    assert LESS_MEMORY in errors and errors.count("\n") == 1
    assert len((tmp_path / "runs/run/logs/restarts.log").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_node_that_is_full_before_anything_runs_is_told_in_a_line(tmp_path: Path) -> None:
    command = Command(tmp_path, "run.name=run", "tracking.mode=disabled", "train.max_steps=5", **full_beyond(1))
    status, errors = command.end(left_s=10)
    assert status == 1, command.lines
    assert errors.startswith("distcond: failed: ran out of memory: the process that watches the workers: its node is full, ")
    assert LESS_MEMORY in errors and errors.count("\n") == 1


@pytest.mark.slow  # a start of Ray or two; what it rests on is tested more cheaply, too
def test_a_fork_is_told_in_a_line_and_what_it_cannot_load_in_another(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    config = faulty_config(tmp_path, run__fork=True, train__max_steps=NUM_STEPS + 5, optim__lr=1e-3)
    save_config(changed(config, model__width=32), tmp_path / "config.yaml")
    command = Command(tmp_path, "--config", "config.yaml")
    status, errors = command.end()
    assert status == 2
    assert re.fullmatch(
        f"distcond: error: .*run-fork/checkpoints/step_{NUM_STEPS:08d} holds shape .*, the model needs .*\n", errors
    )
    assert not (tmp_path / "run-fork").exists()

    save_config(config, tmp_path / "config.yaml")
    command = Command(tmp_path, "--config", "config.yaml")
    assert command.end() == (0, "")
    assert command.lines[0] == f"fork  run at step {NUM_STEPS} goes on as run.name=run-fork\n"
    assert load_config(tmp_path / "run-fork" / "config.yaml") == changed(config, run__fork=False, run__name="run-fork")
    assert [row["step"] for row in read_rows(tmp_path / "run-fork") if "train/loss" in row] == list(
        range(NUM_STEPS + 1, NUM_STEPS + 6)
    )


@pytest.mark.slow  # a start of Ray or two; what it rests on is tested more cheaply, too
def test_a_full_disk_is_told_at_once_and_training_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        config = small_config(disk, train__max_steps=10**6, train__eval_every=10**6, train__log_every=5, checkpoint__every=50)
        prepare_run(config)
        command = Command(tmp_path, "--config", str(disk / "run/config.yaml"))
        wait_until(lambda: (disk / "run/checkpoints/latest").exists())
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(2**12))
        wait_until(lambda: command.says("could not be written: No space left on device; it takes "))
        (disk / "filler").unlink()
        wait_until(lambda: command.says("is written."))
        command.process.send_signal(signal.SIGTERM)
        assert command.end() == (130, "")
        steps = [row["step"] for row in read_rows(disk / "run") if "train/loss" in row]
        assert steps[:-1] == list(range(5, steps[-2] + 1, 5))  # no row is missing
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
