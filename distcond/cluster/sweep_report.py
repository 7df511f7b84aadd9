"""How the trials of a sweep ended: read from their run folders, shown as a table, kept as `sweep.json`."""

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distcond.cluster.search_space import SearchSpace
from distcond.compose import load_config, override, to_dict
from distcond.config import Config
from distcond.data import absolute_paths
from distcond.data.tasks import shape_of
from distcond.errors import RunError
from distcond.pareto import pareto_front
from distcond.train.fits import cost_of
from distcond.train.run_folder import RunFolder, check_continues

STEPS = "val/ponder/steps"
"Mean ponder steps executed on the validation set."
RESULT_FILE = "sweep.json"


class Status(StrEnum):
    """How a trial ended."""

    finished = "finished"
    running = "running"
    stopped = "stopped"
    failed = "failed"
    not_run = "not run"


@dataclass(frozen=True, slots=True)
class Trial:
    """A planned trial: a run of its own."""

    name: str
    overrides: dict[str, Any]
    config: Config

    @classmethod
    def of(cls, base: Config, name: str, overrides: Mapping[str, Any]) -> "Trial":
        """A trial of the sweep whose trials differ from `base`. Raises ConfigError or DataError where it cannot run."""
        config = override(base, {**overrides, "run.name": name})
        return cls(name, dict(overrides), replace(config, data=absolute_paths(config.data)))

    @property
    def told(self) -> dict[str, Any]:
        """What `of` makes the same run of in a process that runs in another folder."""
        data = {f"data.{key}": value for key, value in to_dict(self.config)["data"].items()}
        return {"name": self.name, "overrides": self.overrides | data}

    @property
    def folder(self) -> Path:
        """Absolute run folder."""
        return RunFolder.of(self.config).path

    @property
    def error_file(self) -> Path:
        """Why it failed, in one line."""
        return error_file(self.config, self.name)

    def count_parameters(self) -> int:
        """Parameters of the model, if every node of its trees comes to exist."""
        cost = cost_of(self.config)
        return cost.dense_parameters + cost.node_parameters


@dataclass(slots=True)
class Memory:
    """Names of the trials that have started, of those of them that have ended, and of those that failed, so far."""

    started: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    "Those that had ended before, when the same sweep was interrupted; they are in `started` and `ended`, too."

    @property
    def running(self) -> set[str]:
        """Names of the trials that run."""
        return self.started - self.ended


@dataclass(frozen=True, slots=True)
class Outcome:
    """A trial that has ended; a figure it never reached is None."""

    name: str
    overrides: dict[str, Any]
    status: Status
    steps: int
    quality: float | None
    ponder_steps: float | None
    parameters: int
    folder: str
    error: str | None
    is_over: bool
    "Whether the sweep is done with it, whatever it comes to; an interrupted one is not."

    @property
    def command(self) -> str:
        """The line that runs this trial by itself; a stopped one goes on."""
        return f"distcond train --config {shlex.quote(f'{self.folder}/config.yaml')}"


def error_file(base: Config, name: str) -> Path:
    """Why a trial failed; among the logs of the sweep, for its folder may belong to another run."""
    return Path(base.run.dir) / "logs" / f"{name}.error"


def quality_metric(config: Config) -> str:
    """The validation figure that a run is judged by, smaller is better."""
    return "val/bpb" if shape_of(config.data).kind == "bytes" else "val/sequence_error"


def read_outcome(trial: Trial, memory: Memory, *, is_live: bool = False) -> Outcome:
    """What a trial's run folder says. Truth is in metrics.jsonl: Tune sees only what reached it in time.

    is_live: the sweep goes on, so that a trial without an end is one that runs.
    """
    rows = _read_rows(trial.folder / "metrics.jsonl")
    quality = quality_metric(trial.config)
    validated: dict[str, Any] = next((row for row in reversed(rows) if quality in row), {})
    steps = max((int(row["step"]) for row in rows), default=0)
    status, error = Status.not_run, None
    if trial.name in memory.failed:
        status, error = Status.failed, _read_error(trial.error_file)
    elif steps >= trial.config.train.max_steps:
        status = Status.finished
    elif trial.name in memory.started:
        status = Status.running if is_live and trial.name in memory.running else Status.stopped
    return Outcome(
        name=trial.name,
        overrides=trial.overrides,
        status=status,
        steps=steps,
        quality=validated.get(quality),
        ponder_steps=validated.get(STEPS),
        parameters=trial.count_parameters(),
        folder=str(trial.folder),
        error=error,
        is_over=trial.name in memory.ended - memory.failed,
    )


def read_past(file: Path, trials: Sequence[Trial]) -> set[str]:
    """Names of the trials that an earlier, interrupted run of the same sweep is done with.

    Raises RunError where `sweep.json` is that of another sweep, or such a trial was run with other settings.
    """
    past = _entries(file)
    planned = {trial.name: trial for trial in trials}
    for name, entry in past.items():
        if name not in planned or entry.get("overrides") != planned[name].overrides:
            raise RunError(f"{file.parent} holds another sweep (it has {name}, this one has not); use another sweep.name.")
    over = {name for name, entry in past.items() if entry.get("is_over") and (planned[name].folder / "config.yaml").is_file()}
    for name in sorted(over):
        old = load_config(planned[name].folder / "config.yaml")
        # Sweeps once kept the paths in sweep.space as they were typed.
        check_continues(replace(old, data=absolute_paths(old.data)), planned[name].config, planned[name].folder)
    return over


def read_tried(file: Path, space: SearchSpace, base: Config) -> list[Trial]:
    """The trials that an earlier, interrupted run of a sweep over `space` has made up as it went, over or not.

    Raises RunError where `sweep.json` is that of another sweep: nothing can be learnt from a point outside the space.
    """
    for name, entry in (past := _entries(file)).items():
        if entry["overrides"].keys() != space.kinds.keys():
            raise RunError(f"{file.parent} holds a sweep over other keys ({name}); use another sweep.name.")
        for key in space.lacks(entry["overrides"]):
            raise RunError(
                f"{file.parent} holds a trial outside sweep.space ({name}: {key}={entry['overrides'][key]}); let the space hold "
                "it, or use another sweep.name."
            )
    return [Trial.of(base, name, entry["overrides"]) for name, entry in past.items()]


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    """Trials of `sweep.json` by name; none where there is no file. Raises RunError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        return {entry["name"]: entry for entry in json.loads(file.read_text(encoding="utf-8"))["trials"]}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged; remove it to run all trials again, or use another sweep.name.") from error


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; the last line may be cut short where the trial was stopped in the middle of it."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _read_error(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else "its process died"


def best(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The Pareto front of quality against executed steps, over trials that did not fail, cheapest first."""
    judged = [
        (outcome, (outcome.quality, outcome.ponder_steps))
        for outcome in outcomes
        if outcome.status != Status.failed and outcome.quality is not None and outcome.ponder_steps is not None
    ]
    return [judged[index][0] for index in pareto_front([point for _, point in judged])]


def save(file: Path, name: str, quality: str, outcomes: Sequence[Outcome]) -> None:
    """Write `sweep.json`: everything the table shows, and the space as it was run."""
    front = [outcome.name for outcome in best(outcomes)]
    trials = [{**asdict(outcome), "command": outcome.command, "pareto": outcome.name in front} for outcome in outcomes]
    text = json.dumps({"name": name, "quality": quality, "steps": STEPS, "pareto": front, "trials": trials}, indent=2)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(f"{text}\n", encoding="utf-8")
    temporary.replace(file)


def show(console: Console, folder: Path, quality: str, outcomes: Sequence[Outcome], longer: str = "") -> None:
    """All trials as a table; the Pareto front of quality against executed steps; failures with their logs.

    longer: the command that trains the winner for longer.
    """
    front = best(outcomes)
    console.print(table_of(quality, outcomes))
    _show_lines(console, "Best for their number of steps:", (_front_line(outcome, quality) for outcome in front))
    _show_lines(console, "Train the best for longer:", [longer] if longer else [])
    failed = [outcome for outcome in outcomes if outcome.status == Status.failed]
    _show_lines(console, "Failed:", (f"{outcome.name}: {outcome.error} (logs: {outcome.folder}/logs)" for outcome in failed))
    _show_lines(console, f"All of it: {folder / RESULT_FILE}", ())


def table_of(quality: str, outcomes: Sequence[Outcome]) -> Table:
    """One line a trial, the best one first."""
    front = best(outcomes)
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.overrides))
    title = f"{len(outcomes)} trials; * no other is both better and cheaper"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ["", *(key.rpartition(".")[2] for key in keys), "status"]:
        table.add_column(column, overflow="fold")
    for column in ("step", quality, "ponder steps", "parameters"):
        table.add_column(column, overflow="fold", justify="right")
    for outcome in sorted(outcomes, key=lambda outcome: math.inf if outcome.quality is None else outcome.quality):
        values = [str(outcome.overrides.get(key, "")) for key in keys]
        numbers = [_number(value) for value in (outcome.steps, outcome.quality, outcome.ponder_steps, outcome.parameters)]
        table.add_row("*" if outcome in front else "", *values, outcome.status, *numbers)
    return table


def _show_lines(console: Console, title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines or not title.endswith(":"):
        console.print("\n".join([title, *(f"  {line}" for line in lines)]), markup=False, highlight=False, soft_wrap=True)


def _front_line(outcome: Outcome, quality: str) -> str:
    early = f", stopped at step {outcome.steps}" if outcome.status == Status.stopped else ""
    figures = f"{quality} {_number(outcome.quality)} at {_number(outcome.ponder_steps)} ponder steps"
    return f"{figures}{early}: {outcome.command}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and value < 10**12 else f"{value:.4g}"
