"""The four figures of a proof of concept: operating cost, accuracy, latency, maintainability."""

from dataclasses import dataclass

from distcond.command_line import overrides_of
from distcond.report.gather import RunFacts
from distcond.report.verdict import nearest_fixed, quality_text, quality_unit, seeds_beside
from distcond.report.words import duration, large, plural, show


@dataclass(frozen=True, slots=True)
class Card:
    """One of the four figures."""

    title: str
    value: str
    unit: str
    lines: list[tuple[str, str]]
    is_complete: bool
    "Whether an evaluation measured it."


def cards(run: RunFacts) -> list[Card]:
    """Operating cost, accuracy, latency, maintainability."""
    return [_operating_cost(run), _accuracy(run), _latency(run), _maintainability(run)]


def _operating_cost(run: RunFacts) -> Card:
    element = "byte" if run.is_text else "element"
    memory = run.measured("peak_memory_gib")
    lines = [
        ("ponder steps", _steps_text(run)),
        *_fixed_lines(run),
        ("MACs per example", large(run.measured("macs_per_example"))),
        ("bytes touched per example", large(run.measured("bytes_touched_per_example"))),
        ("peak memory", "–" if memory is None else f"{show(memory, 3)} GiB"),
    ]
    return Card("Operating cost", large(run.macs), f"MACs per {element}", lines, _has(run, "bytes_touched_per_example"))


def _fixed_lines(run: RunFacts) -> list[tuple[str, str]]:
    """The control beside the steps that halting saves."""
    nearest = nearest_fixed(run)
    unit = "" if run.is_text else " wrong"
    return [] if nearest is None else [(f"with {plural(nearest[0], 'step')} for all", f"{quality_text(run, nearest[1])}{unit}")]


def _steps_text(run: RunFacts) -> str:
    ends = [run.measured(f"val/ponder/steps_{name}") for name in ("p50", "p95")]
    known = "" if None in ends else f" (median {show(ends[0], 3)}, 95% within {show(ends[1], 3)})"
    return show(run.steps, 3) + known


def _accuracy(run: RunFacts) -> Card:
    key = run.quality_key
    interval = run.interval
    parts = {"hardest tenth of examples": f"{key}/hardest_tenth", "rare leaves": f"{key}/rare_leaves"}
    lines = [("95% interval", "–" if interval is None else " to ".join(quality_text(run, end) for end in interval))]
    lines += [(label, quality_text(run, run.measured(name))) for label, name in parts.items()]
    return Card("Accuracy", quality_text(run, run.quality), quality_unit(run), lines, _has(run, f"{key}/low"))


def _latency(run: RunFacts) -> Card:
    single = run.measured("latency_ms/batch_1/p50")
    lines = []
    for size in (1, 32, 1024):
        figures = [run.measured(f"latency_ms/batch_{size}/{name}") for name in ("p50", "p95", "p99")]
        if any(figure is not None for figure in figures):
            lines.append((f"batch {size:,}: p50, p95, p99", ", ".join(show(figure, 3) for figure in figures) + " ms"))
    if (throughput := run.measured("throughput_per_s")) is not None:
        lines.append(("throughput", f"{large(throughput)} examples/s"))
    value = single if single is not None else run.measured("latency_ms")
    return Card(
        "Latency", show(value, 3), "ms, one example" if value is not None else "", lines, _has(run, "latency_ms/batch_1/p50")
    )


def _maintainability(run: RunFacts) -> Card:
    settings = run.evaluation.get("maintainability/settings_changed")
    number_of = len(settings) if isinstance(settings, dict) else num_settings(run)
    seeds = seeds_beside(run)
    known = ", ".join(f"seed {seed}: {quality_text(run, value)}" for seed, value in sorted(seeds.items())[:4])
    lines = (
        [("seeds that finished", show(run.measured("maintainability/num_seeds_finished"))), ("their quality", known)]
        if known
        else []
    )
    lines.append(("time to retrain", duration(run.measured("maintainability/retrain_s"))))
    return Card("Maintainability", str(number_of), "settings differ from defaults", lines, _has(run, "maintainability/retrain_s"))


def num_settings(run: RunFacts) -> int:
    """Settings that differ from what `distcond train` composes by itself, but for the names of the run."""
    return sum(not word.startswith("run.") for word in overrides_of(run.config))


def _has(run: RunFacts, key: str) -> bool:
    return run.measured(key) is not None
