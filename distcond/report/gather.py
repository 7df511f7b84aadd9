"""What the folder of a run says without its model: configuration, curves, evaluation, samples, environment.

The files may be a stranger's: what is no finite number counts as missing, and what is not JSON is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distcond.compose import load_config
from distcond.config import Config, HaltingKind
from distcond.data.tasks import shape_of
from distcond.errors import RunError
from distcond.opened import data_differences, find_checkpoint
from distcond.train.checkpoint import read_state
from distcond.train.fits import cost_of
from distcond.train.run_folder import RunFolder

STEPS = "val/ponder/steps"


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run as its files tell it."""

    folder: RunFolder
    config: Config
    checkpoint: Path
    step: int
    "Updates that the checkpoint has seen."
    rows: list[dict[str, Any]]
    "Of metrics.jsonl, ascending."
    evaluation: dict[str, Any]
    "Of that checkpoint; empty: there is none."
    environment: dict[str, Any]
    samples: list[dict[str, Any]]
    "Of the last validation."
    origin_step: int | None = None
    "Of the checkpoint that the run started from (`train.init_from`)."

    @property
    def name(self) -> str:
        """What the run is called on the page."""
        return self.config.run.name or self.folder.path.absolute().name

    @property
    def is_text(self) -> bool:
        """Whether bytes or tokens are predicted."""
        return shape_of(self.config.data).kind == "bytes"

    @property
    def quality_key(self) -> str:
        """The figure that a run is judged by, small is good."""
        return "val/bpb" if self.is_text else "val/sequence_error"

    @property
    def ponders(self) -> bool:
        """Whether inputs decide on their number of steps."""
        return self.config.model.halting.kind in {HaltingKind.act, HaltingKind.ponder}

    @property
    def has_tree(self) -> bool:
        """Whether the data choose the weights."""
        return self.config.model.tree.depth > 0

    def measured(self, key: str) -> float | None:
        """A figure of the evaluation."""
        return number(self.evaluation, key)

    def figure(self, key: str) -> float | None:
        """A figure of the evaluation or, where there is none, of the last validation up to the checkpoint."""
        value = self.measured(key)
        past = [row for row in reversed(self.rows) if row["step"] <= self.step]
        return value if value is not None else next((found for row in past if (found := number(row, key)) is not None), None)

    @property
    def quality(self) -> float | None:
        """Bits per byte, or the share of wrong sequences."""
        return self.figure(self.quality_key)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the quality, where the run was evaluated."""
        low, high = (self.measured(f"{self.quality_key}/{end}") for end in ("low", "high"))
        return None if low is None or high is None else (low, high)

    @property
    def most_steps(self) -> int:
        """Ponder steps that an element may take."""
        halting = self.config.model.halting
        return 1 if halting.kind == HaltingKind.none else halting.max_steps

    @property
    def steps(self) -> float | None:
        """Mean ponder steps of an element of the validation set."""
        return self.figure(STEPS) if self.ponders else float(self.most_steps)

    @property
    def macs(self) -> float | None:
        """MACs of an element: measured, else by the closed form."""
        value, steps = self.measured("macs_per_position"), self.steps
        return value if value is not None or steps is None else cost_of(self.config).macs(steps)


def number(values: Mapping[Any, Any], key: Any) -> float | None:
    """A finite number; None for anything else."""
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if -1e300 < value < 1e300 else None


def read_run(run: Path) -> RunFacts:
    """Read the files of a run. Raises RunError as `find_checkpoint` does, and where a file is no JSON."""
    if RunFolder(run).is_held():
        raise RunError(f"{run} is still being written; report on it once the run has ended.")
    folder, config, checkpoint = find_checkpoint(run)
    state = read_state(checkpoint)
    step, started = int(state["step"]), state["summary"].get("init_from")
    origin = number(started, "step") if isinstance(started, dict) else None
    rows = _read_rows(folder.path / "eval" / "samples.jsonl")
    samples = rows[-1].get("samples") if rows else []
    return RunFacts(
        folder=folder,
        config=config,
        checkpoint=checkpoint,
        step=step,
        rows=_read_rows(folder.metrics),
        evaluation=_read_object(folder.path / "eval" / f"step_{step:08d}.json"),
        environment=_read_object(folder.environment_file),
        samples=[sample for sample in samples if isinstance(sample, dict)] if isinstance(samples, list) else [],
        origin_step=None if origin is None else int(origin),
    )


def read_at(folder: RunFolder, step: int) -> RunFacts:
    """A run as it was at a step, whatever has become of that checkpoint and of the run since.

    Raises RunError where a file is no JSON, ConfigError where its configuration is of another version.
    """
    return RunFacts(
        folder=folder,
        config=load_config(folder.config_file),
        checkpoint=folder.checkpoints / f"step_{step:08d}",
        step=step,
        rows=[row for row in _read_rows(folder.metrics) if row["step"] <= step],
        evaluation=_read_object(folder.path / "eval" / f"step_{step:08d}.json"),
        environment=_read_object(folder.environment_file),
        samples=[],
    )


def step_shares(run: RunFacts) -> dict[int, float]:
    """Share of the positions that take 1, 2, ... steps, from the evaluation; empty where it has none."""
    found = run.evaluation.get(f"{STEPS}_histogram")
    shares = dict(enumerate(found, 1)) if isinstance(found, list) else {}
    known = {steps: value for steps in shares if (value := number(shares, steps)) is not None}
    return known if known and len(known) == len(shares) else {}


def check_comparable(facts: Sequence[RunFacts]) -> None:
    """Refuse runs of different data, whose figures mean different things. Raises RunError that names the first difference."""
    first = facts[0]
    for other in facts[1:]:
        own, its = asdict(first.config.data), asdict(other.config.data)
        for key in data_differences(first.config, other.config):
            raise RunError(
                f"{first.folder.path} has data.{key}={own[key]!r}, {other.folder.path} has {its[key]!r}: runs of different data "
                "cannot be compared; make a report of each."
            )
        sums = [_validation_sha256(facts.environment) for facts in (first, other)]
        if all(sums) and sums[0] != sums[1]:
            raise RunError(
                f"{first.folder.path} and {other.folder.path} were validated on different texts (by their sha256), so they "
                "cannot be compared; make a report of each."
            )


def _validation_sha256(environment: Mapping[str, Any]) -> Any:
    data = environment.get("data")
    validation = data.get("validation") if isinstance(data, dict) else None
    return validation.get("sha256") if isinstance(validation, dict) else None


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not file.is_file():
        return {}
    value = _parse(file.read_bytes(), str(file))
    if not isinstance(value, dict):
        raise RunError(f"{file} is damaged (it is no JSON object); remove it or write it anew.")
    return value


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """Objects with a step, a line each; the last line may be cut short where the run was stopped in the middle of it."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    rows = [_parse(line, f"{file}, line {place}") for place, line in enumerate(lines, 1)]
    for place, row in enumerate(rows, 1):
        if not isinstance(row, dict) or number(row, "step") is None:
            raise RunError(f"{file}, line {place}, is damaged (it is no JSON object with a step); remove that line.")
    return rows


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} is damaged (it is no JSON); remove it or write it anew.") from error
