"""A run that grew out of another one (`train.init_from`) beside it: the same function at first, and what came of it."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distcond.command_line import train_line
from distcond.config import RunConfig
from distcond.errors import ConfigError, RunError
from distcond.redaction import redact
from distcond.report.beside import MEASURED, beside
from distcond.report.charts import Curve, curves
from distcond.report.curves import Figure, series
from distcond.report.gather import RunFacts, check_comparable, number, read_at
from distcond.report.tables import Table
from distcond.report.verdict import difference, interval_text, quality_text, quality_unit, signed_quality
from distcond.report.words import large, plural, show
from distcond.train.fits import cost_of
from distcond.train.grow import becomes, changes_function, deepens
from distcond.train.run_folder import find_parent, parent_of

ROUNDING = 1e-4
"Relative. Of the same weights, fp32 sums over other ranks, batches or kernels differ by about 1e-6 of a figure."


@dataclass(frozen=True, slots=True)
class Growth:
    """What the page says of it."""

    sentences: list[str]
    table: Table | None = None
    figure: Figure | None = None
    control: str = ""
    "Command that trains the parent as much longer, unchanged; empty where the run is that, or the parent is not known."


def growth(run: RunFacts) -> Growth | None:
    """A run beside its parent; None where it has none."""
    given = run.config.train.init_from
    if not given:
        return None
    folder = find_parent(run.folder, Path(parent_of(run.config)))
    if folder is None or run.origin_step is None:
        return Growth([f"It started from the run {given}, which is gone, so nothing can be set beside it."])
    try:
        parent = read_at(folder, run.origin_step)
        check_comparable([run, parent])
        parent = replace(parent, evaluation=parent.evaluation | _told_by(run, parent))
    except (RunError, ConfigError) as error:
        return Growth([f"It started from the run {given}, which cannot be set beside it: {error}"])
    sentences = [_origin(run, parent), _first_row(run, parent), _since(run, parent)]
    return Growth(sentences, _table(run, parent), _curve(run, parent), _control(run, parent))


def _origin(run: RunFacts, parent: RunFacts) -> str:
    was, depth = parent.config.model.tree.depth, run.config.model.tree.depth
    made = []
    if grown := becomes(parent.config, run.config):
        made.append(f"{', '.join(grown)} became {'trees' if len(grown) > 1 else 'a tree'} of depth {depth}")
    if deeper := deepens(parent.config, run.config):
        made.append(f"{', '.join(deeper)} became {depth} levels deep, from {was}")
    told = " and ".join(made) or "no new trees"
    return f"It started from the weights of {parent.name} ({parent.folder.path}) at step {parent.step:,}; {told}."


def _first_row(run: RunFacts, parent: RunFacts) -> str:
    """Whether the first row, of step 0, repeats the parent's last."""
    key = run.quality_key
    first = next((value for row in run.rows if row["step"] == 0 and (value := number(row, key)) is not None), None)
    last = [(int(row["step"]), value) for row in parent.rows if (value := number(row, key)) is not None]
    if first is None or not last:
        return "Whether it was the same function at first is not known: there is no validation of both."
    step, before = last[-1]
    figures = (
        f"At step 0 it has {quality_text(run, first)} {quality_unit(run)}, where {parent.name} had {quality_text(run, before)} "
        f"at step {step:,}"
    )
    if step != parent.step:
        return f"{figures}: not the weights it started from, so the two may differ."
    if changes_function(parent.config, run.config):
        return f"{figures}: it halts otherwise, so it was another function from the start."
    is_same = abs(first - before) <= ROUNDING * abs(before)
    return f"{figures}: {'the same function' if is_same else 'another function, which it ought not to be'}."


def _since(run: RunFacts, parent: RunFacts) -> str:
    before, after = (
        quality_text(run, one.quality) + (f" ({interval_text(one)})" if one.interval else "") for one in (parent, run)
    )
    macs = f", at {run.macs / parent.macs:.3g} times the MACs" if run.macs is not None and parent.macs else ""
    text = f"With {plural(run.step, 'update')} of its own it went from {before} to {after} {quality_unit(run)}{macs}."
    own, its = (shlex.quote(str(one.folder.path)) for one in (run, parent))
    command = f"distcond evaluate {own} --against {its}"
    if (found := difference(run)) is None or not _told_by(run, parent):
        return f"{text} The interval of the difference was not evaluated; run {command}"
    value, low, high = (signed_quality(run, part) for part in found)
    return f"{text} The difference is {value} (95% interval {low} to {high})."


def _told_by(run: RunFacts, parent: RunFacts) -> dict[str, Any]:
    """What the run's evaluation says of its parent, timed in turn with it; empty where it was not against that."""
    found = run.evaluation.get("against")
    names = (parent.folder.path.resolve().name, parent.step)
    return found if isinstance(found, dict) and (found.get("run"), found.get("step")) == names else {}


def _table(run: RunFacts, parent: RunFacts) -> Table:
    both = (parent, run)

    def text(value: float | None) -> str:
        return quality_text(run, value)

    quality, (low, high) = [one.quality for one in both], zip(*(one.interval or (None, None) for one in both), strict=True)
    rows = [
        (quality_unit(run), *quality, text),
        ("from (95% interval)", *low, text),
        ("to", *high, text),
        ("ponder steps", *(one.steps for one in both), lambda value: show(value, 3)),
        (f"MACs per {'byte' if run.is_text else 'element'}", *(one.macs for one in both), large),
        ("parameters, all nodes", *(_parameters(one) for one in both), large),
        ("updates of its own", *(float(one.step) for one in both), show),
        *((label, *(one.measured(key) for one in both), shown) for label, key, shown in MEASURED),
    ]
    return beside("What the parent was and what the run is; a dash: not evaluated.", ("before", "after", "ratio"), rows)


def _parameters(run: RunFacts) -> float:
    cost = cost_of(run.config)
    return float(cost.dense_parameters + cost.node_parameters)


def _curve(run: RunFacts, parent: RunFacts) -> Figure | None:
    """Validation of the parent up to the step that the run started from, and of the run behind it."""
    key = run.quality_key
    own = [(parent.step + step, value) for step, value in series(run, key)]
    lines = [Curve(parent.name, series(parent, key), "other"), Curve(run.name, own, "main")]
    if not any(line.points for line in lines):
        return None
    chart = curves(f"{key} of {parent.name}, then of {run.name}", lines, "updates, the parent's included", key)
    return Figure("Before and after", f"validation; thin {parent.name}, thick {run.name}", chart)


def _control(run: RunFacts, parent: RunFacts) -> str:
    """The parent with as many updates more and nothing changed, unless the run is that."""
    if run.config.model == parent.config.model:
        return ""
    changes = {
        "run.name": f"{parent.name}-again",
        "run.dir": RunConfig().dir,
        "train.init_from": str(parent.folder.path),
        "train.max_steps": run.config.train.max_steps,
    }
    return redact(train_line(parent.config, changes))
