"""Where the computation goes: a text coloured by executed steps, loss and entropy; steps against difficulty; who gets how much.

Legend: B examples, T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distcond.data.generated import GeneratedTask
from distcond.data.places import PLACES, places_of
from distcond.data.tasks import Task, TextTask
from distcond.positions import Positions
from distcond.rank_correlation import rank_correlation
from distcond.report.probe import Probe
from distcond.report.words import glyphs, show

EXCERPT = 1024
"Bytes or tokens of text that are shown."
SHADES = 10
"Heights of the bar behind a byte."


@dataclass(frozen=True, slots=True)
class Sign:
    """A byte of the text, or a token."""

    sign: str
    shades: tuple[int, int, int]
    "Steps, loss, entropy: 0 to SHADES - 1."
    tip: str
    ends_line: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Elements that have something in common, e.g. four gates, or the start of a word."""

    name: str
    share: float
    steps: float
    loss: float
    "Mean bits."
    wrong: float
    entropy: float


@dataclass(frozen=True, slots=True)
class Spending:
    """What the page shows of it."""

    excerpt: list[list[Sign]]
    "Windows of the text; empty where elements are vectors."
    scales: list[tuple[str, float, float]]
    "What a bar behind a byte means: name, least, most; steps, loss, entropy."
    groups: list[Group]
    by: str
    "What the groups differ in; empty: there are none."
    histogram: list[tuple[int, float]]
    "Steps and the share of elements that took so many."
    positions: int
    unit: str
    correlation: float | None
    "Spearman's, of steps and loss; None: all took the same number of steps."


def spending(task: Task, probe: Probe) -> Spending:
    """The map of what was seen."""
    seen = probe.positions
    steps, loss = seen.steps[seen.valid], seen.nll[seen.valid]
    number, count = np.unique(steps, return_counts=True)
    by, groups = _groups(task, probe)
    scales = _scales(seen)
    is_text = task.kind == "bytes"
    return Spending(
        excerpt=_excerpt(task, probe, scales) if is_text else [],
        scales=scales,
        groups=groups,
        by=by,
        histogram=[(int(n), float(c) / len(steps)) for n, c in zip(number, count, strict=True)],
        positions=len(steps),
        unit=task.unit[:-1] if isinstance(task, TextTask) else "token" if is_text else "element",
        correlation=rank_correlation(steps, loss) if len(number) > 1 and np.ptp(loss) > 0 else None,
    )


def _scales(seen: Positions) -> list[tuple[str, float, float]]:
    """From nothing to what 98% of elements stay below; of steps, from the fewest to the most."""
    steps = seen.steps[seen.valid]
    ends = [max(float(np.quantile(part[seen.valid], 0.98)), 1e-6) for part in (seen.loss_bits, seen.entropy_bits)]
    return [("steps", float(steps.min()), float(steps.max())), ("loss", 0.0, ends[0]), ("entropy", 0.0, ends[1])]


def _excerpt(task: Task, probe: Probe, scales: Sequence[tuple[str, float, float]]) -> list[list[Sign]]:
    length = min(task.max_length, EXCERPT)
    seen = probe.positions
    count = max(1, min(len(seen.steps), EXCERPT // length))
    rows = np.arange(count) * len(seen.steps) // count
    shown = (seen.steps, seen.loss_bits, seen.entropy_bits)
    first = next((use.first_leaf_BTM for use in probe.layers.values()), None)
    is_bytes = task.input_size == 256
    windows = []
    for row in rows.tolist():
        targets = probe.batch.targets[row, :length].tolist()
        signs = glyphs(targets, is_bytes=is_bytes)
        columns = [part[row, :length].tolist() for part in shown]
        leaves = [""] * length if first is None else [_leaf(leaf) for leaf in first[row, :length].tolist()]
        rows_of = zip(targets, signs, *columns, leaves, strict=True)
        windows.append([_sign(value, sign, figures, leaf, scales, is_bytes) for value, sign, *figures, leaf in rows_of])
    return windows


def _sign(
    value: int, sign: str, figures: Sequence[float], leaf: str, scales: Sequence[tuple[str, float, float]], is_bytes: bool
) -> Sign:
    shades = [_shade(figure, low, high) for figure, (_, low, high) in zip(figures, scales, strict=True)]
    steps, loss, entropy = figures
    head = f"byte {value} (0x{value:02X}) {sign}" if is_bytes else f"token {value}"
    tip = f"{head}\nsteps {int(steps)}\nloss {show(loss, 3)} bits\nentropy {show(entropy, 3)} bits{leaf}"
    return Sign(sign, (shades[0], shades[1], shades[2]), tip, ends_line=is_bytes and value == 0x0A)


def _shade(value: float, low: float, high: float) -> int:
    return min(SHADES - 1, max(0, int(SHADES * (value - low) / (high - low)))) if high > low else 0


def _leaf(leaves: Sequence[int]) -> str:
    return f"\nleaf at step 1: {', '.join(map(str, leaves[:4]))}{' ...' if len(leaves) > 4 else ''}"


def _groups(task: Task, probe: Probe) -> tuple[str, list[Group]]:
    """What elements are told apart by, and the figures of each group that has any."""
    batch = probe.batch
    if isinstance(task, TextTask) and task.unit == "bytes":
        places = places_of(np.concatenate([batch.inputs[:, :1], batch.targets], axis=1))
        return "place in the text", _by_group(probe.positions, places, list(PLACES))
    if isinstance(task, GeneratedTask) and task.measure:
        names = [str(amount) for amount in range(task.input_size + 1)]
        return task.measure, _by_group(probe.positions, task.measured(batch.inputs), names)
    return "", []


def _by_group(seen: Positions, group_BT: np.ndarray, names: Sequence[str]) -> list[Group]:
    valid = seen.valid
    group, total = group_BT[valid], int(valid.sum())
    count = np.bincount(group, minlength=len(names))
    columns = [seen.steps, seen.loss_bits, seen.wrong > 0, seen.entropy_bits]
    means = [np.bincount(group, part[valid].astype(float), len(names)) / np.maximum(count, 1) for part in columns]
    shown = [place for place in range(len(names)) if count[place]]
    return [Group(names[place], count[place] / total, *(float(mean[place]) for mean in means)) for place in shown]
