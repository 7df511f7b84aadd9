"""`distcond sweep`: distributed trials by Ray Tune, stopped early by ASHA, ending in a table and its Pareto front."""

import importlib.util
import math
import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from distcond.cluster.initial import check_start
from distcond.cluster.local import preflight, ray_session
from distcond.cluster.policy import Room, ask_of, check_room, num_runs_at_once
from distcond.cluster.search_space import corners, parse_space, plan_trials
from distcond.cluster.sweep_plot import PLOT_FILE, plot
from distcond.cluster.sweep_report import (
    RESULT_FILE,
    Memory,
    Outcome,
    Status,
    Trial,
    quality_metric,
    read_outcome,
    read_past,
    read_tried,
    save,
    show,
    table_of,
)
from distcond.command_line import train_line
from distcond.compose import override
from distcond.config import Config, DataConfig, Search, SweepConfig
from distcond.config.readers import check_read
from distcond.data import build_task
from distcond.errors import ConfigError
from distcond.train.run_folder import RunFolder, parent_of

LONGEST_NAME = 80
"Of a trial's folder, in characters."
LONGER = 4
"Times as many steps for the winner."
SAVE_TIMEOUT_S = 6.0
"How long Ctrl-C waits for the trials that run to save themselves."


def sweep(config: Config) -> int:
    """The whole of `distcond sweep`; returns the exit status, 1 if any trial failed.

    The same sweep.name again goes on where the sweep was interrupted: what is over stays, what was running continues.
    Raises ConfigError, ClusterError or RunError before anything starts.
    """
    config = name_sweep(config)
    planned = plan(config)
    folder, number, trials = Path(config.run.dir) / config.sweep.name, len(planned), planned
    if config.sweep.search == Search.optuna:
        trials = read_tried(folder / RESULT_FILE, parse_space(config.sweep.space), base_of(config))
        number = max(config.sweep.num_samples, len(trials))
    kept = read_past(folder / RESULT_FILE, trials)
    memory = Memory(started=set(kept), ended=set(kept), kept=kept)
    for trial in planned:
        preflight(trial.config.cluster)
    check_start([trial.config for trial in planned])
    open_data(planned)
    report = Report(config.sweep.name, quality_metric(planned[0].config), trials, number, folder, memory)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    try:
        if len(kept) < number:
            with ray_session(config.cluster, folder / "logs") as room:
                _run(config, planned, room, report)
    finally:  # what there is after Ctrl-C is worth a table too
        outcomes = report.write()
        if any(outcome.status != Status.not_run for outcome in outcomes):
            has_plot = plot(folder / PLOT_FILE, config.sweep.name, report.quality, outcomes)
            show(report.console, folder, report.quality, outcomes, longer(report.trials, outcomes))
            if has_plot:
                report.console.print(f"As a picture: {folder / PLOT_FILE}", markup=False, highlight=False, soft_wrap=True)
    return int(any(outcome.status == Status.failed for outcome in outcomes))


def _run(config: Config, planned: Sequence[Trial], room: Room, report: "Report") -> None:
    # NOTE: Tune is imported here rather than above: a mistake in the space is to be told before.
    from distcond.cluster.tuning import make_scheduler, run_trials

    for trial in planned:
        check_room(ask_of(trial.config.cluster), room)
    at_once = min(num_at_once(planned, room, config.sweep.max_concurrent), report.number)
    scheduler = make_scheduler(config, grace_steps(config))
    before = f", {len(report.memory.kept)} of them done before" if report.memory.kept else ""
    report.console.print(f"{report.number} trials, {at_once} at a time{before}", highlight=False)
    suggester = None
    if config.sweep.search == Search.optuna:
        from distcond.cluster.suggest import Suggester

        def make(index: int, overrides: dict[str, Any]) -> Trial:
            return Trial.of(base_of(config), trial_name(index, overrides), overrides)

        space, past = parse_space(config.sweep.space), list(report.trials)
        suggester = Suggester(space, report.quality, config.seed, report.number, past, make, report.add)
    try:
        with report.live():
            run_trials(
                report.trials,
                base_of(config),
                scheduler,
                suggester,
                number=report.number,
                at_once=at_once,
                logs=report.folder / "logs",
                memory=report.memory,
                ended=report.tell,
            )
    except KeyboardInterrupt:
        report.console.print("Stopping, after a checkpoint of what runs; once more stops at once.", soft_wrap=True)
        stop([trial for trial in report.trials if trial.name in report.memory.running], SAVE_TIMEOUT_S)
        raise


class Report:
    """What a sweep shows and keeps while it runs."""

    def __init__(self, name: str, quality: str, trials: Sequence[Trial], number: int, folder: Path, memory: Memory) -> None:
        """trials: those that there are already, of `number` in the end."""
        self.trials, self.number = list(trials), number
        self.folder, self.memory, self.console = folder, memory, Console()
        self.quality, self._name = quality, name

    def add(self, trial: Trial) -> None:
        """Keep a trial that was made up just now: nothing else tells what its folder is."""
        self.trials.append(trial)
        save(self.folder / RESULT_FILE, self._name, self.quality, self._outcomes())

    def write(self) -> list[Outcome]:
        """Keep what there is in `sweep.json`, from which an interrupted sweep goes on."""
        outcomes = self._outcomes()
        if any(outcome.status != Status.not_run for outcome in outcomes):
            save(self.folder / RESULT_FILE, self._name, self.quality, outcomes)
        return outcomes

    def _outcomes(self) -> list[Outcome]:
        return [read_outcome(trial, self.memory) for trial in self.trials]

    def tell(self, trial: Trial) -> None:
        """A line for a trial that has ended."""
        self.write()
        outcome = read_outcome(trial, self.memory)
        quality = "" if outcome.quality is None else f", {self.quality} {outcome.quality:.4g}"
        ended = f"[{len(self.memory.ended)}/{self.number}]"
        line = f"{ended} {trial.name}: {outcome.status} at step {outcome.steps}{quality}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def live(self) -> AbstractContextManager[Any]:
        """The table of trials as it is now, where there is a terminal."""
        if not self.console.is_terminal:
            return nullcontext()
        return Live(console=self.console, get_renderable=self._table, refresh_per_second=1, transient=True)

    def _table(self) -> Table:
        outcomes = [read_outcome(trial, self.memory, is_live=True) for trial in list(self.trials)]
        return table_of(self.quality, outcomes)


def longer(trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> str:
    """The command that trains the trial of the best quality for LONGER times as many steps, as a run of its own."""
    judged = [outcome for outcome in outcomes if outcome.quality is not None and outcome.status != Status.failed]
    if not judged:
        return ""
    winner = min(judged, key=lambda outcome: (outcome.quality, outcome.ponder_steps or math.inf))
    config = next(trial.config for trial in trials if trial.name == winner.name)
    name = f"{Path(config.run.dir).name}-{winner.name}"
    steps = LONGER * config.train.max_steps
    return train_line(config, {"run.dir": str(Path(config.run.dir).parent), "run.name": name, "train.max_steps": steps})


def stop(trials: Sequence[Trial], timeout_s: float) -> None:
    """Ask runs to save themselves and end; returns when they have, or after `timeout_s`."""
    folders = [RunFolder(trial.folder) for trial in trials]
    for folder in folders:
        folder.stop_file.touch()
    deadline = time.monotonic() + timeout_s
    while any(folder.is_held() for folder in folders) and time.monotonic() < deadline:
        time.sleep(0.1)


def name_sweep(config: Config) -> Config:
    """The configuration with absolute folders and a sweep.name (`sweep-<yyyymmdd-hhmmss>` where it was empty)."""
    name = config.sweep.name or time.strftime("sweep-%Y%m%d-%H%M%S")
    if "/" in name or name in {".", ".."}:
        raise ConfigError(f"sweep.name={name!r} must be a plain folder name; put the folder into run.dir.")
    folders = {"run.dir": str(Path(config.run.dir).expanduser().resolve()), "train.init_from": parent_of(config)}
    return override(config, {**folders, "sweep.name": name})


def base_of(config: Config) -> Config:
    """What the trials of a named sweep have in common."""
    folder = {"run.dir": f"{config.run.dir}/{config.sweep.name}", "tracking.group": config.sweep.name}
    return override(replace(config, sweep=SweepConfig()), {**folder, "train.eval_every": validation_interval(config)})


def plan(config: Config) -> list[Trial]:
    """The trials of a named sweep, each a valid run of its own; of one by Optuna the corners of its space.

    Raises ConfigError, naming the trial, where one is not.
    """
    space, base = parse_space(config.sweep.space), base_of(config)
    is_planned = config.sweep.search == Search.random
    if not is_planned and importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "sweep.search=optuna needs the package optuna, which is not installed; pip install 'distcond[optuna]', or use "
            "sweep.search=random."
        )
    trials = []
    for index, overrides in enumerate(
        plan_trials(space, config.sweep.num_samples, config.seed) if is_planned else corners(space)
    ):
        try:
            trial = Trial.of(base, trial_name(index, overrides), overrides)
            check_read(trial.config, overrides)
            trials.append(trial)
        except ConfigError as error:
            values = ", ".join(f"{key}={value}" for key, value in overrides.items())
            raise ConfigError(f"sweep.space has a trial that cannot run ({values}): {error}") from error
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
