"""Quality with an interval, and where it is worst.

Legend: E examples, T positions, V visits of a tree layer.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distcond.data.batch import Batch
from distcond.data.generated import GeneratedTask
from distcond.data.tasks import Task
from distcond.evaluate.seen import PerExample
from distcond.evaluate.visits import Visited
from distcond.positions import Array, Positions

RESAMPLES = 1000
SEED = 0
NORMAL_95 = 1.959964
"Standard deviations on either side of the mean that hold 95% of a normal distribution."


@dataclass(frozen=True, slots=True)
class Quality:
    """The figure that a task is judged by, less of which is better: sum of `value` over sum of `count`."""

    name: str
    "val/bpb of text, else val/sequence_error."
    value: Array
    "[E], bits of an example, or 1 where any of its targets was missed."
    count: Array
    "[E], bytes that were predicted, or 1 where there was any target."
    by_position: Array | None
    "Bits of every position [E, T]; None: the figure is of whole sequences."

    @classmethod
    def of(cls, seen: Positions, *, is_text: bool, bytes_per_token: float) -> "Quality":
        """From the figures of positions."""
        if is_text:
            bits_ET = seen.loss_bits
            return cls("val/bpb", bits_ET.sum(1), seen.asked.sum(1) * bytes_per_token, bits_ET / bytes_per_token)
        return cls("val/sequence_error", (seen.wrong.sum(1) > 0).astype(float), (seen.asked.sum(1) > 0).astype(float), None)

    def mean(self, examples: Array | slice = slice(None)) -> float:
        """Of some examples; NaN where nothing was asked."""
        return _ratio(self.value[examples].sum(), self.count[examples].sum())

    def interval(self) -> tuple[float, float]:
        """95% interval over draws of the validation examples from what they are a sample of; it does not tell of seeds.

        Of text: percentiles of RESAMPLES bootstrap samples of whole examples, of a fixed seed (Efron & Tibshirani 1993,
        chapter 13). Of sequences that are right or wrong: Wilson's interval (1927), which is not empty without an error.
        """
        if self.by_position is None:
            return wilson(self.value.sum(), self.count.sum())
        return bootstrap(self.value, self.count)


def bootstrap(value_E: Array, count_E: Array) -> tuple[float, float]:
    """95% interval of sum(value) / sum(count), examples drawn with replacement; always the same for the same arrays."""
    rng = np.random.default_rng(SEED)
    number = len(value_E)
    drawn = (rng.integers(0, number, number) for _ in range(RESAMPLES))
    ratios = [_ratio(value_E[rows].sum(), count_E[rows].sum()) for rows in drawn]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def wilson(hits: float, number: float) -> tuple[float, float]:
    """95% interval of a share, hits of number (Wilson 1927, J. Am. Stat. Assoc. 22)."""
    if not number:
        return math.nan, math.nan
    share, spread = hits / number, NORMAL_95**2 / number
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def difficulty(task: Task) -> tuple[str, PerExample | None]:
    """What the hardest examples are found by, without asking a model, so that they are the same for every run.

    zlib: bytes that a text is compressed to (LZ77 and Huffman codes). Of a task, the sum of its measure over the vectors of a
    sequence, e.g. gates. A task without a measure has only "entropy": of what the model itself predicts; the mark is None.
    """
    if task.kind == "bytes":
        return "zlib", lambda batch: np.array([len(zlib.compress(row.tobytes(), 9)) for row in batch.inputs])
    if isinstance(task, GeneratedTask) and task.measure:
        measured = task.measured

        def amount(batch: Batch) -> Array:
            inside_BT = np.arange(batch.inputs.shape[1]) < batch.lengths[:, None]
            return np.asarray(np.where(inside_BT, measured(batch.inputs), 0).sum(1))

        return task.measure, amount
    return "entropy", None


def hardest(quality: Quality, difficulty_E: Array, nll_E: Array) -> dict[str, float]:
    """Quality of the tenth of the examples that is hardest by a measure that knows no answers, and of the worst tenth.

    NOTE: the worst tenth is chosen by the loss that it then reports: it describes the tail, and a comparison of it with other
    examples would find it worse whatever the model is.
    """
    return {
        f"{quality.name}/hardest_tenth": quality.mean(_tenth(difficulty_E)),
        f"{quality.name}/worst_tenth": quality.mean(_tenth(nll_E)),
    }


def rare(quality: Quality, visits: Mapping[str, Visited], length: int) -> dict[str, float]:
    """Quality where leaves are rare: of each layer the least visited ones, as many as it takes to hold a tenth of the visits.

    A visit is one position in one ponder step at one tree. It counts with the bits of its position, or with the error of its
    sequence, so that a position which has one of two visits in rare leaves counts half. rare_leaves_pct: visits that are
    such; more than ten where a leaf is coarse. Empty without a layer whose visits are known.
    """
    value = total = num_rare = num_visits = 0.0
    for position_V, leaf_V in visits.values():
        _, index_V, count_G = np.unique(leaf_V, return_inverse=True, return_counts=True)
        order_G = np.argsort(count_G, kind="stable")
        before_G = np.cumsum(count_G[order_G]) - count_G[order_G]
        is_rare_G = np.zeros(len(count_G), bool)
        is_rare_G[order_G[before_G < len(leaf_V) / 10]] = True
        found = position_V[is_rare_G[index_V]]
        of_text = quality.by_position
        value += (of_text.flatten()[found] if of_text is not None else quality.value[found // length]).sum()
        total += len(found) if of_text is not None else quality.count[found // length].sum()
        num_rare, num_visits = num_rare + len(found), num_visits + len(leaf_V)
    if not num_visits:
        return {}
    share = 100 * num_rare / num_visits
    return {f"{quality.name}/rare_leaves": _ratio(value, total), f"{quality.name}/rare_leaves_pct": share}


def by_group(seen: Positions, names: list[str], group_ET: Array, *, is_text: bool) -> dict[str, Any]:
    """Mean steps of positions that differ in something: gates, digits, the place in a line; of text share (%) and bits too."""
    group_N = group_ET[seen.valid]
    counts = np.bincount(group_N, minlength=len(names))
    figures: dict[str, Any] = {}
    for number in np.flatnonzero(counts):
        inside_ET = seen.valid & (group_ET == number)
        means = {"pct": 100 * counts[number] / counts.sum(), "steps": seen.steps[inside_ET].mean()}
        means["bits"] = seen.loss_bits[inside_ET].mean()
        figures |= {f"val/{names[number]}/{kind}": float(means[kind]) for kind in (means if is_text else ["steps"])}
    return figures


def _tenth(key_E: Array) -> Array:
    """The examples with the highest keys, a tenth of them, at least one; among equals the first ones."""
    return np.argsort(-key_E, kind="stable")[: math.ceil(len(key_E) / 10)]


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count else math.nan
