"""What tests of whole runs share: the command as a process, its processes, and what a run leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
from safetensors.numpy import load_file

from distcond.cluster.trainer import prepare_run
from distcond.config import Config
from tests.helpers import sealers_below, small_config

TIMEOUT_S = 240.0
"Longer than anything here takes on two busy cores; what takes longer hangs."

SLOW_START = {"RAY_raylet_start_wait_time_s": "120", "RAY_gcs_server_port_wait_time_s": "120"}
"Environment of a Ray that starts on busy cores; Ray's own patience is 30 s."


def wait_until(happens: Callable[[], Any], timeout_s: float = TIMEOUT_S, poll_s: float = 0.05) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := happens()):
        assert time.monotonic() < end, "this hangs"
        time.sleep(poll_s)
    return found


def within(limit_s: float, work: Callable[[], Any]) -> Any:
    """The result of work that takes so long at most, in the best of three attempts: the first may find files out of memory."""
    for _ in range(3):
        start = time.monotonic()
        result = work()
        if time.monotonic() - start < limit_s:
            return result
    raise AssertionError(f"this takes {limit_s:g} s or more")


def read_rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clocks(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not key.startswith(("perf/", "mem/"))}


def crowded(config: Config) -> Config:
    """The same with workers that leave room for what other tests run meanwhile."""
    return replace(config, cluster=replace(config.cluster, cpus_per_worker=0.1))


NUM_STEPS, EVERY = 200, 10
"Of the run that nothing happens to, and of those that end as it does: long enough to be struck before its end."


def faulty_config(folder: Path, **changes: Any) -> Config:
    """That of the fixture `undisturbed`, for a run in another folder."""
    base = {"train__max_steps": NUM_STEPS, "train__eval_every": 20, "checkpoint__every": EVERY}
    return crowded(small_config(folder, **{**base, **changes}))


def last_step(run: Path) -> int:
    """The last step in the metrics of a run that is going on; 0 if there is none."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    steps = [json.loads(line)["step"] for line in lines[-2:] if line.endswith(b"\n")]
    return int(steps[-1]) if steps else 0


def tensors_of(run: Path) -> dict[str, np.ndarray]:
    """All tensors of the newest checkpoint, by file and name."""
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return {f"{file.name}/{name}": value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_end(run: Path, undisturbed: Path) -> None:
    """The same weights, moments and counters, and the same figures of every step, as if nothing had happened."""
    tensors, expected = tensors_of(run), tensors_of(undisturbed)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].tobytes() == tensor.tobytes(), name
    assert figures_of(run) == figures_of(undisturbed)


def figures_of(run: Path) -> list[dict[str, float]]:
    """The rows of training steps, once each, without what the clock decides."""
    return [without_clocks(row) for row in read_rows(run) if "train/loss" in row]


def find_workers() -> list[psutil.Process]:
    """Processes of ranks below this one; Ray names them after the class of the actor."""
    return find_processes("RayTrainWorker")


def find_processes(actor: str) -> list[psutil.Process]:
    """Processes below this one of actors of this class."""
    return processes_of(actor, psutil.Process().children(recursive=True))


def processes_of(actor: str, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that are of actors of this class."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if "".join(process.cmdline()).startswith(f"ray::{actor}"):
                found.append(process)
    return found


def signal_all(processes: Iterable[psutil.Process], number: int = signal.SIGKILL) -> None:
    """Signal each that is still there: of Ray's processes some end by themselves as soon as another has."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


class Command:
    """`distcond train` as a process of its own, in a group of its own as a terminal would start it."""

    begun: ClassVar[list["Command"]] = []

    def __init__(self, folder: Path, *words: str, before: Sequence[str] = (), **environment: str) -> None:
        self.folder = folder
        self.process = psutil.Popen(
            [*before, sys.executable, "-u", str(Path(sys.executable).with_name("distcond")), "train", *words],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | SLOW_START | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.started: set[psutil.Process] = set()
        self.begun.append(self)
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()

    def says(self, text: str) -> bool:
        self.started |= set(self.process.children(recursive=True))
        assert self.process.poll() is None, f"ended early: {self.lines} {self.process.stderr.read()}"
        return any(text in line for line in self.lines)

    def reaches(self, run: Path, step: int) -> bool:
        self.says("")  # it has not ended early
        return last_step(run) >= step

    def end(self, left_s: float = 2.0, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
        """Exit status and what was written to stderr; nothing that was started may be left, left_s later."""
        status = self.process.wait(timeout_s)
        end = time.monotonic()
        self._reader.join()
        with self.process.stderr as stream:
            errors = stream.read()
        self.process.stdout.close()
        # Ray's processes end a moment after their parent, and those that write checkpoints finish what they have begun.
        for alive in (lambda: any(map(is_alive, self.started)), lambda: sealers_below(self.folder)):
            wait_until(lambda alive=alive: not alive(), timeout_s=left_s - (time.monotonic() - end))
        return status, errors


def end_commands() -> None:
    """End what a test has left when it failed."""
    while Command.begun:
        command = Command.begun.pop()
        if command.process.poll() is None:
            signal_all([command.process, *command.process.children(recursive=True), *sealers_below(command.folder)])


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)  # which nobody may be there to reap
    except psutil.NoSuchProcess:
        return False


def words(folder: Path, **changes: Any) -> list[str]:
    """The command line of a small run that would never end."""
    config = small_config(folder, train__max_steps=10**6, train__log_every=5, checkpoint__every=10**6, **changes)
    prepare_run(config)
    return ["--config", str(folder / "run" / "config.yaml")]
