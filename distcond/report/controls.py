"""What an evaluation says against too good an impression of halting: steps that were shuffled, and steps that were fixed."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from distcond.pareto import pareto_front
from distcond.report.charts import Dot, scatter
from distcond.report.curves import Figure
from distcond.report.gather import RunFacts
from distcond.report.tables import Cell, Table
from distcond.report.verdict import chance_of, fixed_steps, quality_text, quality_unit, signed_quality
from distcond.report.words import MISSING, large, show
from distcond.train.fits import cost_of

WAYS = {
    "shuffled": "over all positions",
    "within_sequences": "within each sequence",
    "at_equal_positions": "whole sequences, at equal positions",
}
"Of shuffling steps, as `evaluate` names them."


@dataclass(frozen=True, slots=True)
class Fixed:
    """The checkpoint with a number of steps forced on everyone, beside what halting takes."""

    table: Table
    figure: Figure


def chance_table(run: RunFacts) -> Table | None:
    """Rank correlations of steps beside those of shuffled steps; None where none were evaluated."""
    rows = []
    for of in ("loss", "entropy"):
        found = run.measured(f"control/steps_{of}_rank_correlation")
        for way, name in WAYS.items():
            chance, p = chance_of(run, of, way), run.measured(f"control/steps_{of}_{way}_p")
            if found is None or chance is None:
                continue
            low, high = chance
            shown = f"{low:+.3f} to {high:+.3f}"
            verdict = "above chance" if found > high else "below chance" if found < low else "as by chance"
            rows.append(
                [
                    *(Cell(of, of), Cell(f"{found:+.3f}", found), Cell(name, name), Cell(shown, shown)),
                    *(Cell(show(p, 2), p), Cell(verdict, verdict)),
                ]
            )
    columns = [("steps with", False), ("rank correlation", True), ("steps shuffled", False), ("then, 95%", False)]
    caption = (
        "Whether more steps go where it is harder, on the whole validation set. At equal positions, what the place in the "
        "sequence decides about both stays, so that only what goes beyond it is above chance."
    )
    return Table(caption, [*columns, ("p, one-sided", True), ("so", False)], rows) if rows else None


def fixed(run: RunFacts) -> Fixed | None:
    """None where halting is not the inputs' own, or nothing was forced."""
    forced, steps, macs, quality = fixed_steps(run), run.steps, run.macs, run.quality
    if not (run.ponders and forced) or steps is None or macs is None or quality is None:
        return None
    cost = cost_of(run.config)
    points = [_Point(f"{number} for all", number, cost.macs(number), forced[number]) for number in sorted(forced)]
    points.append(_Point(f"{show(steps, 3)}, as inputs decide", steps, macs, quality))
    front = pareto_front([(point.quality, point.macs) for point in points])
    title = "Halting beside fixed steps"
    note = "a number is of steps. On both axes less is better. Discs: none is better in both; squares are beaten."
    return Fixed(_fixed_table(run, points), Figure(title, note, _fixed_chart(run, points, front)))


@dataclass(frozen=True, slots=True)
class _Point:
    name: str
    steps: float
    macs: float
    quality: float


def _fixed_table(run: RunFacts, points: Sequence[_Point]) -> Table:
    own, rows = points[-1], []
    for point in points:
        more, change = point.macs / own.macs - 1, point.quality - own.quality
        is_own = point is own
        rows.append(
            [
                *(Cell(point.name, point.name), Cell(large(point.macs), point.macs)),
                Cell(MISSING if is_own else f"{more:+.1%}", more),
                Cell(quality_text(run, point.quality), point.quality),
                Cell(MISSING if is_own else signed_quality(run, change), change),
            ]
        )
    columns = [("steps", False), (f"MACs per {'byte' if run.is_text else 'element'}", True), ("change", True)]
    caption = (
        "The same checkpoint with a number of steps forced on everyone, the control beside any saving; changes are from what "
        "halting takes and gives. Less is better."
    )
    return Table(caption, [*columns, (quality_unit(run), True), ("change", True)], rows)


def _fixed_chart(run: RunFacts, points: Sequence[_Point], front: Sequence[int]) -> Markup:
    dots, unit = [], "byte" if run.is_text else "element"
    for place, point in enumerate(points):
        is_own = point is points[-1]
        low, high = (run.interval if is_own else None) or (None, None)
        tip = f"steps: {point.name}\n{quality_text(run, point.quality)} {quality_unit(run)}"
        label = f"halting, {show(point.steps, 3)}" if is_own else show(point.steps)
        dots.append(Dot(point.macs, point.quality, f"{tip}\n{large(point.macs)} MACs", label, place in front, low, high))
    return scatter("Quality by steps: forced on everyone, and as inputs decide", dots, f"MACs per {unit}", run.quality_key)
