"""Ten minutes in which something happens to a run every 20 s; it ends as an undisturbed run of as many steps, bit for bit.

DISTCOND_CHAOS_S: another length, in seconds. Events and recoveries, one JSON line each, are kept beside the run folder.
"""

import json
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from distcond.cluster.trainer import prepare_run
from distcond.config import Config
from tests.cluster.processes import TIMEOUT_S, Command, assert_same_end, last_step, processes_of, signal_all, wait_until
from tests.helpers import changed, sealers_below, small_config

DURATION_S = float(os.environ.get("DISTCOND_CHAOS_S", "600"))
BETWEEN_S = 20.0
RECOVERY_S = 90.0
"Longest recovery: two starts of Ray on two busy cores, and an interval to repeat."
SEED = 0


class Chaos:
    """A run, started again whenever its command ends, and what may happen to it."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.run, self.draw = folder, folder / "run", draw
        self.start()

    def start(self) -> None:
        self.command = Command(self.folder, "--config", "run/config.yaml")

    def find(self, actor: str) -> list[psutil.Process]:
        return wait_until(lambda: processes_of(actor, self.command.process.children(recursive=True)))

    def kill_worker(self) -> None:
        self.draw.choice(self.find("RayTrainWorker")).kill()

    def freeze_worker(self) -> None:
        self.draw.choice(self.find("RayTrainWorker")).suspend()

    def kill_data_actor(self) -> None:
        self.draw.choice(self.find("_DataActor")).kill()

    def kill_while_a_checkpoint_is_written(self) -> None:
        workers = self.find("RayTrainWorker")
        wait_until(lambda: list((self.run / "checkpoints").glob(".step_*.tmp")), poll_s=0.001)
        signal_all(workers)

    def kill_driver(self) -> None:
        self.command.process.kill()
        self.command.end(left_s=10)
        self.start()

    def kill_everything(self) -> None:
        signal_all([self.command.process, *self.command.process.children(recursive=True), *sealers_below(self.folder)])
        self.command.end(left_s=10)
        self.start()

    def terminate(self) -> None:
        self.command.process.terminate()
        status, errors = self.command.end(left_s=10)
        assert (status, errors) == (130, "")
        self.start()


EVENTS: list[Callable[[Chaos], None]] = [
    Chaos.kill_worker,
    Chaos.freeze_worker,
    Chaos.kill_data_actor,
    Chaos.kill_while_a_checkpoint_is_written,
    Chaos.kill_driver,
    Chaos.kill_everything,
    Chaos.terminate,
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(
        tmp_path,
        train__max_steps=10**6,
        train__eval_every=100,
        checkpoint__every=25,
        cluster__max_failures=1000,
        cluster__hang_timeout_s=15.0,
    )


@pytest.fixture
def chaos(config: Config, tmp_path: Path) -> Iterator[Chaos]:
    prepare_run(config)
    chaos = Chaos(tmp_path, random.Random(SEED))
    yield chaos
    signal_all([chaos.command.process])


@pytest.mark.ray
@pytest.mark.slow
def test_whatever_happens_a_run_ends_as_if_nothing_had(chaos: Chaos, config: Config, tmp_path: Path) -> None:
    run, draw = chaos.run, random.Random(SEED + 1)
    wait_until(lambda: chaos.command.reaches(run, 1))
    start, recoveries = time.monotonic(), []
    with (tmp_path / "chaos.jsonl").open("w", buffering=1) as log:
        while (now := time.monotonic() - start) < DURATION_S:
            event = draw.choice(EVENTS)
            event(chaos)
            step = last_step(run)
            wait_until(lambda step=step: chaos.command.reaches(run, step + 2))  # one that was done may be logged late
            recoveries.append(time.monotonic() - start - now)
            record = {"at_s": now, "event": event.__name__, "step": step, "recovered_s": recoveries[-1]}
            log.write(json.dumps(record) + "\n")
            print(record)
            assert recoveries[-1] < RECOVERY_S
            time.sleep(max(3.0, draw.uniform(0.5, 1.5) * BETWEEN_S - recoveries[-1]))
    print(f"{len(recoveries)} events; recovery {statistics.median(recoveries):.1f} s median, {max(recoveries):.1f} s max")
    chaos.command.process.send_signal(signal.SIGTERM)
    assert chaos.command.end()[0] == 130

    steps = json.loads((run / "summary.json").read_text())["step"]
    prepare_run(changed(config, run__name="undisturbed", train__max_steps=steps))
    assert Command(tmp_path, "--config", "undisturbed/config.yaml").end(timeout_s=TIMEOUT_S + DURATION_S) == (0, "")
    assert_same_end(run, tmp_path / "undisturbed")
