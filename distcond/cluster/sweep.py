"""`distcond sweep`: distributed trials by Ray Tune, stopped early by ASHA, ending in a table and its Pareto front."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from distcond.cluster.local import preflight, ray_session
from distcond.cluster.policy import Room, ask_of, check_room, num_runs_at_once
from distcond.cluster.search_space import parse_space, plan_trials
from distcond.cluster.sweep_report import (
    RESULT_FILE,
    Memory,
    Status,
    Trial,
    quality_metric,
    read_outcome,
    save,
    show,
)
from distcond.compose import override
from distcond.config import Config, DataConfig, SweepConfig
from distcond.data import absolute_paths, build_task
from distcond.errors import ConfigError, RunError
from distcond.train.run_folder import RunFolder

LONGEST_NAME = 80
"Of a trial's folder, in characters."
SAVE_TIMEOUT_S = 6.0
"How long Ctrl-C waits for the trials that run to save themselves."


def sweep(config: Config) -> int:
    """The whole of `distcond sweep`; returns the exit status, 1 if any trial failed.

    Raises ConfigError or ClusterError before anything starts.
    """
    config = name_sweep(config)
    config = replace(config, data=absolute_paths(config.data))  # trials run in other folders
    trials = plan(config)
    for trial in trials:
        preflight(trial.config.cluster)
    open_data(trials)
    folder, memory = Path(config.run.dir) / config.sweep.name, Memory()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    try:
        with ray_session(config.cluster, folder / "logs") as room:
            _run(config, trials, room, folder / "logs", memory)
    finally:  # what there is after Ctrl-C is worth a table too
        outcomes = [read_outcome(trial, memory) for trial in trials]
        if any(outcome.status != Status.not_run for outcome in outcomes):
            quality = quality_metric(trials[0].config)
            save(folder / RESULT_FILE, config.sweep.name, quality, outcomes)
            show(Console(), folder, quality, outcomes)
    return int(any(outcome.status == Status.failed for outcome in outcomes))


def _run(config: Config, trials: Sequence[Trial], room: Room, logs: Path, memory: Memory) -> None:
    # NOTE: Tune is imported here rather than above: a mistake in the space is to be told before.
    from distcond.cluster.tuning import make_scheduler, run_trials

    for trial in trials:
        check_room(ask_of(trial.config.cluster), room)
    at_once = num_at_once(trials, room, config.sweep.max_concurrent)
    scheduler = make_scheduler(config, grace_steps(config))
    Console().print(f"{len(trials)} trials, {at_once} at a time", highlight=False)
    try:
        run_trials(trials, scheduler, at_once, logs, memory)
    except KeyboardInterrupt:
        Console().print("Stopping, after a checkpoint of what runs; once more stops at once.", soft_wrap=True)
        stop([trial for trial in trials if trial.name in memory.running], SAVE_TIMEOUT_S)
        raise


def stop(trials: Sequence[Trial], timeout_s: float) -> None:
    """Ask runs to save themselves and end; returns when they have, or after `timeout_s`."""
    folders = [RunFolder(trial.folder) for trial in trials]
    for folder in folders:
        folder.stop_file.touch()
    deadline = time.monotonic() + timeout_s
    while any(_is_held(folder) for folder in folders) and time.monotonic() < deadline:
        time.sleep(0.1)


def _is_held(folder: RunFolder) -> bool:
    try:
        with folder.locked():
            return False
    except RunError:
        return True


def name_sweep(config: Config) -> Config:
    """The configuration with an absolute run.dir and a sweep.name (`sweep-<yyyymmdd-hhmmss>` where it was empty)."""
    name = config.sweep.name or time.strftime("sweep-%Y%m%d-%H%M%S")
    if "/" in name or name in {".", ".."}:
        raise ConfigError(f"sweep.name={name!r} must be a plain folder name; put the folder into run.dir.")
    return override(config, {"run.dir": str(Path(config.run.dir).expanduser().resolve()), "sweep.name": name})


def plan(config: Config) -> list[Trial]:
    """The trials of a named sweep, each a valid run of its own. Raises ConfigError, naming the trial, where one is not."""
    space = parse_space(config.sweep.space)
    base = replace(config, sweep=SweepConfig())
    base = override(base, {"run.dir": f"{config.run.dir}/{config.sweep.name}", "tracking.group": config.sweep.name})
    base = override(base, {"train.eval_every": validation_interval(config)})
    trials = []
    for index, overrides in enumerate(plan_trials(space, config.sweep.num_samples, config.seed)):
        name = trial_name(index, overrides)
        try:
            trial = override(base, {**overrides, "run.name": name})
        except ConfigError as error:
            values = ", ".join(f"{key}={value}" for key, value in overrides.items())
            raise ConfigError(f"sweep.space has a trial that cannot run ({values}): {error}") from error
        trials.append(Trial(name, overrides, trial))
    if len({quality_metric(trial.config) for trial in trials}) > 1:
        raise ConfigError("sweep.space mixes text and tasks, which are not judged by one figure; make two sweeps of it.")
    return trials


def open_data(trials: Sequence[Trial]) -> None:
    """Prepare each trial's text, or refuse it, before anything is started. Raises DataError."""
    seen: list[DataConfig] = []
    for data in (trial.config.data for trial in trials):
        if data not in seen:
            seen.append(data)
            build_task(data)


def trial_name(index: int, overrides: dict[str, Any]) -> str:
    """Folder name of a trial: its number, then its values by the last part of their keys."""
    values = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in overrides.items())
    return re.sub(r"[^\w.=+-]+", "_", f"{index:03d}-{values}")[:LONGEST_NAME]


def grace_steps(config: Config) -> int:
    """Steps that every trial gets before ASHA may stop it."""
    return max(1, math.ceil(config.sweep.asha_grace * config.train.max_steps))


def validation_interval(config: Config) -> int:
    """Steps between validations of a trial, such that one falls on every rung of ASHA: it decides at validations."""
    grace = grace_steps(config)
    return config.train.eval_every if grace % config.train.eval_every == 0 else grace


def num_at_once(trials: Sequence[Trial], room: Room, limit: int | None) -> int:
    """Trials side by side: as many of the largest as there is room for, at least one."""
    fits = min(num_runs_at_once(ask_of(trial.config.cluster), room) for trial in trials)
    return max(1, min(fits, len(trials), limit or len(trials)))
