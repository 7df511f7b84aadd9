"""Figures of two runs beside each other: of a run and the one that `distcond evaluate --against` set beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distcond.report.gather import RunFacts, number
from distcond.report.tables import Cell, Table
from distcond.report.verdict import difference, quality_text, quality_unit, signed_quality
from distcond.report.words import large, show

Show = Callable[[float | None], str]
"How a figure is written."
MEASURED: tuple[tuple[str, str, Show], ...] = (
    ("MACs an example", "macs_per_example", large),
    ("bytes touched an example", "bytes_touched_per_example", large),
    *((f"ms, batch {size:,}, p50", f"latency_ms/batch_{size}/p50", lambda value: show(value, 3)) for size in (1, 32, 1024)),
    ("examples a second", "throughput_per_s", large),
    ("peak memory, GiB", "peak_memory_gib", lambda value: show(value, 3)),
)
"Of an evaluation: what it is, its key, and how it is written."


@dataclass(frozen=True, slots=True)
class Against:
    """What an evaluation says of another run beside this one."""

    name: str
    difference: str
    "In a sentence; empty where the evaluation has none."
    table: Table


def against(run: RunFacts) -> Against | None:
    """The other run of `distcond evaluate --against`; None where there was none."""
    other = run.evaluation.get("against")
    if not isinstance(other, dict):
        return None
    name, key = str(other.get("run", "the other run")), run.quality_key

    def text(value: float | None) -> str:
        return quality_text(run, value)

    figures: list[tuple[str, str, Show]] = [(quality_unit(run), key, text), ("hardest tenth", f"{key}/hardest_tenth", text)]
    figures += [("ponder steps", "val/ponder/steps", lambda value: show(value, 3)), *MEASURED]
    rows = [(label, number(other, key), run.measured(key), shown) for label, key, shown in figures]
    caption = "Both measured in one command, timed in turn. Quality, computation, memory: less is better."
    return Against(name, _difference(run, name), beside(caption, (name, run.name, "ratio"), rows))


def _difference(run: RunFacts, name: str) -> str:
    found = difference(run)
    if found is None:
        return ""
    value, low, high = (signed_quality(run, part) for part in found)
    verdict = "better" if found[2] < 0 else "worse" if found[1] > 0 else "not told apart"
    return f"{quality_unit(run).capitalize()}, {run.name} minus {name}: {value} (95% interval {low} to {high}), {verdict}."


def beside(caption: str, names: tuple[str, str, str], rows: Sequence[tuple[str, float | None, float | None, Show]]) -> Table:
    """A table of figures: what it is, of one run, of the other, and the second over the first; rows without any are left out."""
    columns = [("figure", False), *((name, True) for name in names)]
    cells = []
    for label, first, second, shown in rows:
        if first is None and second is None:
            continue
        ratio = second / first if first and second is not None else None
        cells.append([Cell(label, label), *(Cell(shown(value), value) for value in (first, second)), Cell(show(ratio, 3), ratio)])
    return Table(caption, columns, cells)
