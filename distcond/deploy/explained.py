"""An explanation as tables for a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

SHOWN = 24
"Rows of a table; the JSON has all of them."


def show(explained: dict[str, Any]) -> str:
    """What `explain` found."""
    prediction = explained["prediction"]
    outputs = zip(prediction["outputs"], prediction["probabilities"], strict=True)
    said = "  ".join(f"{_text(output)} {probability:.1%}" for output, probability in outputs)
    loss = "" if prediction["loss"] is None else f"   loss {prediction['loss']:.4f} nats"
    target = "" if explained["target"] is None else f"   target {_text(explained['target'])}"
    given = explained["given"]
    context = f" after {_text(given[-40:])}" if isinstance(given, str) else ""
    parts = [
        f"position {explained['position']}{context}\nsays {said}{target}{loss}   {prediction['ponder_steps']} ponder steps",
        *(_pass(one, explained["layer"]) for one in explained.get("passes", [])),
    ]
    if explained.get("flips"):
        parts.append("with one bit flipped, the largest changes first\n" + _flips(explained["flips"]))
    parts.append("halting at another step\n" + _forced(explained["forced"]))
    return "\n\n".join(parts)


def show_stability(found: dict[str, Any]) -> str:
    """What `stability` found: a column for each pair of runs."""
    pairs = found["pairs"]
    numbers = {run: str(found["runs"].index(run)) for run in found["runs"]}
    legend = "\n".join(f"{number}  {run}" for run, number in numbers.items())
    head = ["level", *("-".join(numbers[run] for run in pair["runs"]) for pair in pairs)]
    rows = [
        [str(level + 1), *(f"{pair['adjusted_rand_per_level'][level]:.3f}" for pair in pairs)] for level in range(found["depth"])
    ]
    what = f"adjusted Rand index of regions, {found['positions']:,} validation positions (1: the same, 0: chance)"
    return f"{what}\n{legend}\n{_table(head, rows)}"


def _pass(one: dict[str, Any], layer: str) -> str:
    head = ["tree", "level", "node", "bit", "gate", "|U x|", "share", "of bias"]
    rows = [
        [
            node["tree"],
            node["level"],
            node["node"],
            "" if node["bit"] is None else node["bit"],
            "" if node["gate"] is None else f"{node['gate']:+.3f}",
            f"{node['norm']:.3f}",
            f"{node['share']:+.1%}",
            f"{node['bias_share']:+.1%}",
        ]
        for node in one["nodes"]
    ]
    total = sum(node["share"] + node["bias_share"] for node in one["nodes"])
    return (
        f"step {one['step']}: {layer}, leaf {' '.join(map(str, one['leaves']))}, |y| = {one['output_norm']:.3f}; "
        f"shares sum to {total:.6f}\n{_table(head, rows)}"
    )


def _flips(rows: list[dict[str, Any]]) -> str:
    rows = sorted(rows, key=lambda row: -row["divergence"])
    head = ["step", "tree", "level", "|dy|/|y|", *_CHANGED]
    return _table(head, [[row["step"], row["tree"], row["level"], f"{row['output_change']:.1%}", *_changed(row)] for row in rows])


def _forced(rows: list[dict[str, Any]]) -> str:
    return _table(["steps", *_CHANGED], [[f"{row['steps']}{' (own)' if row['is_own'] else ''}", *_changed(row)] for row in rows])


_CHANGED = ("says", "probability", "loss", "change", "divergence", "steps taken")


def _changed(row: dict[str, Any]) -> list[str]:
    losses = ["", ""] if row["loss"] is None else [f"{row['loss']:.4f}", f"{round(row['loss_change'], 4) + 0.0:+.4f}"]
    said = " ".join(_text(output) for output in row["outputs"])
    probability = " ".join(f"{value:.1%}" for value in row["probabilities"])
    return [said, probability, *losses, f"{row['divergence']:.4f}", str(row["ponder_steps"])]


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _table(head: Iterable[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(map(str, head)), *([*map(str, row)] for row in rows[:SHOWN])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return text + (f"\n... {len(rows) - SHOWN} more; --json FILE writes all" if len(rows) > SHOWN else "")
