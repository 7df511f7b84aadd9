"""The screen's view of an evaluation: first the four figures that a proof of concept is judged by, then everything."""

import re
from collections.abc import Mapping
from typing import Any

from distcond.evaluate.chance import WAYS

GROUP = re.compile(r"val/\w+/(pct|steps|bits)$")
CHANCE = "control/steps_"
QUALITIES = {"val/bpb": "bits per byte", "val/sequence_error": "sequences with an error"}
SECTIONS = {
    "operating cost": {
        "macs_per_example": "MACs an example",
        "bytes_touched_per_example": "bytes of weights an example touches",
        "val/ponder/steps": "steps a position takes",
        "throughput_positions_per_s": "positions per s here",
        "peak_memory_gib": "GiB at most",
    },
    "accuracy": {
        "{q}": "{quality}",
        "{q}/low": "from (95% interval)",
        "{q}/high": "to",
        "{q}/hardest_tenth": "hardest tenth by {hardest_by}",
        "{q}/worst_tenth": "worst tenth by loss",
        "{q}/rare_leaves": "rare leaves",
    },
    "latency": {
        f"latency_ms/batch_{size}/{at}": f"ms, batch {size}, {at}" for size in (1, 32, 1024) for at in ("p50", "p95", "p99")
    },
    "maintainability": {
        "maintainability/num_settings_changed": "settings that differ from the defaults",
        "maintainability/num_seeds_finished": "seeds that finished",
        "maintainability/retrain_s": "s to train it again",
    },
}
"Heading -> key -> what it is."


def table(result: Mapping[str, Any]) -> str:
    """An evaluation as text; with another run beside it, both and their ratio."""
    name = next(name for name in QUALITIES if name in result)
    words = {"q": name, "quality": QUALITIES[name], "hardest_by": result["hardest_by"]}
    other, ratios = result.get("against"), result.get("against/ratios", {})
    rows = [("", [str(result["run"]), *([str(other["run"]), "ratio"] if other else [])])]
    shown = set()
    for heading, keys in SECTIONS.items():
        rows.append((heading, []))
        for template, text in keys.items():
            key = template.format(**words)
            if key in result:
                shown.add(key)
                numbers = [result[key], *([other.get(key), ratios.get(key)] if other else [])]
                rows.append((f"  {text.format(**words)}", [_number(number) for number in numbers]))
    width = max(len(label) for label, _ in rows)
    columns = max(10, *(len(cell) for _, cells in rows for cell in cells))
    head = [f"{label:<{width}}  {'  '.join(cell.rjust(columns) for cell in cells)}".rstrip() for label, cells in rows]
    groups = {key: value for key, value in result.items() if GROUP.match(key) and not key.startswith((name, "val/ponder"))}
    told = shown | groups.keys() | {key for key in result if key.startswith((CHANCE, "against"))}
    rest = {key: value for key, value in result.items() if key not in told}
    parts = [[*head, *_difference(result)], _lines(rest), _chance(result), _by_group(groups)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _lines(figures: Mapping[str, Any]) -> list[str]:
    width = max(map(len, figures), default=0)
    return [f"{key:<{width}}  {_value(value)}" for key, value in figures.items()]


def _by_group(figures: Mapping[str, float]) -> list[str]:
    """A line for each group, a column for each of its figures."""
    names = list(dict.fromkeys(key.split("/")[1] for key in figures))
    kinds = list(dict.fromkeys(key.split("/")[2] for key in figures))
    width = max(map(len, names), default=0)
    lines = [[f"{name:<{width}}", *(f"{figures[f'val/{name}/{kind}']:8.4g}" for kind in kinds)] for name in names]
    return ["  ".join([" " * width, *(f"{kind:>8}" for kind in kinds)]), *map("  ".join, lines)] if names else []


def _chance(result: Mapping[str, Any]) -> list[str]:
    """Rank correlations of steps, and beside them those of steps that were shuffled in each way: the middle 95%, and p."""
    lines = []
    for of in ("loss", "entropy"):
        name = f"{CHANCE}{of}"
        if f"{name}_rank_correlation" in result:
            ranges = [
                f"{result[f'{name}_{way}_low']:+.3f} to {result[f'{name}_{way}_high']:+.3f} (p {result[f'{name}_{way}_p']:.3g})"
                for way in WAYS
            ]
            lines.append([f"steps with {of}", f"{result[f'{name}_rank_correlation']:+.3f}", *ranges])
    heads = ["", "rank correlation", *(f"by chance, {way.replace('_', ' ')}" for way in WAYS)]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in (heads, *lines)]
    return ["  ".join(line).rstrip() for line in padded] if lines else []


def _difference(result: Mapping[str, Any]) -> list[str]:
    if "against/difference" not in result:
        return []
    own, low, high = (f"{result[f'against/difference{end}']:.4g}" for end in ("", "/low", "/high"))
    return [f"quality less that of {result['against']['run']}: {own} ({low} to {high})"]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(_value(part) for part in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1e4 else f"{value:.4g}"
