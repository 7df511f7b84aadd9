"""The part of a sweep that Ray Tune does: start trials side by side, hear of their validations, stop the worse ones early.

Imported while Ray is being started: it takes seconds, in which a mistake in the space has long been told.
"""

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from distcond.cluster.progress import Tail
from distcond.cluster.sweep_report import Memory, Trial, error_file, quality_metric
from distcond.cluster.trainer import fit, prepare_run
from distcond.config import Config
from distcond.errors import TrainingError, UserError
from distcond.redaction import redact
from distcond.train.run_folder import RunFolder

HEAD = "node:__internal_head__"
"A resource of the head of every Ray cluster, of which there is 1. Drivers share it: they compute nothing, need no core."
HEAD_SHARE = 0.9
"What the drivers may use of it together; Ray's own actors use a few thousandths."
POLL_INTERVAL_S = 0.2
STOP_TIMEOUT_S = 300.0
"How long a trial may take to save itself once it is told to stop; then its processes are killed."
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep as it ends any program, without Tune's slow good-bye
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run logs itself
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output shows a panel even where it is asked for silence
}


def run_trials(
    trials: Sequence[Trial],
    base: Config,
    scheduler: TrialScheduler,
    suggester: Searcher | None,
    *,
    number: int,
    at_once: int,
    logs: Path,
    memory: Memory,
    ended: Callable[[Trial], None],
) -> None:
    """Run all trials on the Ray that is there, `at_once` side by side; what happens to them goes to `memory` as it does.

    suggester: says what the trials are, `number` in all, and adds them to `trials`; None: they are planned. Of those in
    memory.kept the scheduler hears what they came to, and nothing is run. ended: called with each that ends. logs: absolute
    folder for Tune's own files.
    """
    os.environ |= SETTINGS
    planned = [trial.told for trial in trials]
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(Driver, base=base, kept=frozenset(memory.kept)), driver_resources(at_once)),
        param_space={"trial": tune.grid_search(planned)} if suggester is None else None,
        tune_config=tune.TuneConfig(
            search_alg=suggester,
            num_samples=1 if suggester is None else number,
            scheduler=scheduler,
            max_concurrent_trials=at_once,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(logs),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a run keeps its own
            # Tune warns of every trial that leaves it no result.json.
            callbacks=[_Watcher(memory, lambda name: ended(_named(trials, name))), JsonLoggerCallback()],
        ),
    )
    tuner.fit()


def driver_resources(at_once: int) -> dict[str, float]:
    """What a trial's driver reserves: such a share that the next one starts when the last has given back its workers.

    NOTE: for Tune a trial is over once it is told to stop; without this, the next would wait for workers against a clock.
    """
    return {HEAD: int(HEAD_SHARE * 10_000 / at_once) / 10_000}


def make_scheduler(config: Config, grace_steps: int) -> TrialScheduler:
    """ASHA over training steps, which stops nobody before `grace_steps`, and nobody at the last step.

    NOTE: by default ASHA ends every trial the moment it reports max_t.
    """
    last = config.train.max_steps
    if grace_steps >= last:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="step",
        metric=quality_metric(config),
        mode="min",
        grace_period=grace_steps,
        max_t=last - 1,
        reduction_factor=config.sweep.asha_reduction,
        stop_last_trials=False,
    )


class Driver(tune.Trainable):  # type: ignore[misc]  # Ray is untyped
    """One trial, in a process of Tune's: `distcond train` on one side, on the other its validations, one a step of Tune's.

    A trial that is stopped early is asked to, by RUN/stop, and saves itself as any run does. NOTE: Ray's own way, a
    function that Tune kills, leaves the placement group behind where the controller of Ray Train dies with it (ray
    #54305), and with it the cores that the next trial waits for.
    """

    def setup(self, config: dict[str, Any], base: Config, kept: frozenset[str]) -> None:
        """Called by Tune: config holds a trial of `base`. Of one that goes on, or is `kept`, earlier validations count too."""
        self._error_file = error_file(base, config["trial"]["name"])
        with _kept_in(self._error_file):
            self._start(Trial.of(base, **config["trial"]), kept)

    def _start(self, trial: Trial, kept: frozenset[str]) -> None:
        self._trial = trial
        self._folder = RunFolder(trial.folder)
        self._step = 0
        self._validations: deque[dict[str, Any]] = deque()
        self._last: dict[str, Any] = {}
        self._error: Exception | None = None
        self._rows = Tail(self._folder.metrics, whole=True)
        self._thread = threading.Thread(target=self._train, daemon=True)
        if trial.name in kept:
            self._read()
        else:
            self._error_file.unlink(missing_ok=True)
            self._thread.start()

    def _train(self) -> None:
        try:
            prepare_run(self._trial.config)
            fit(self._trial.config)
        except Exception as error:  # noqa: BLE001 - step() raises it
            self._error = error

    def step(self) -> dict[str, Any]:
        """Wait for the next validation; returns its row, at the end of the run the last one again, marked as done."""
        with _kept_in(self._error_file):
            return self._next()

    def _next(self) -> dict[str, Any]:
        is_running = True
        while is_running and not self._validations:
            is_running = self._thread.is_alive()  # asked before reading, so that no row is missed
            self._read()
            if is_running and not self._validations:
                time.sleep(POLL_INTERVAL_S)
        if self._validations:
            self._last = self._validations.popleft()
            return self._last
        if self._error is not None:
            raise self._error
        return {**self._last, "done": True}

    def _read(self) -> None:
        quality = quality_metric(self._trial.config)
        for row in map(json.loads, self._rows.read()):
            if quality in row and row["step"] > self._step:  # a run that goes on from a checkpoint repeats some
                self._step = row["step"]
                # A run that has diverged writes null; to ASHA it is the worst of all.
                self._validations.append(row if row[quality] is not None else {**row, quality: math.inf})

    def cleanup(self) -> None:
        """Called by Tune when the trial has ended or is to be stopped early: returns when its workers are gone."""
        if self._thread.is_alive():
            self._folder.stop_file.touch()
            self._thread.join(STOP_TIMEOUT_S)


@contextmanager
def _kept_in(file: Path) -> Iterator[None]:
    """Keep why it fails for the process of the sweep, to which Tune tells no more than that it did."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, UserError | TrainingError) else f"{type(error).__name__}: {error}"
        file.write_text(redact(" ".join(text.split())), encoding="utf-8")
        raise


def _name_of(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


def _named(trials: Sequence[Trial], name: str) -> Trial:
    return next(trial for trial in trials if trial.name == name)


class _Watcher(tune.Callback):  # type: ignore[misc]  # Ray is untyped
    """Remembers which trials have started, ended and failed."""

    def __init__(self, memory: Memory, ended: Callable[[str], None]) -> None:
        self._memory, self._ended = memory, ended

    def __getstate__(self) -> dict[str, Any]:
        """NOTE: Tune pickles its callbacks, to go on after a crash of its own; nobody reads that."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._memory.started.add(_name_of(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(_name_of(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._memory.failed.add(_name_of(trial))
        self._end(_name_of(trial))

    def _end(self, name: str) -> None:
        self._memory.ended.add(name)
        if name not in self._memory.kept:
            self._ended(name)
