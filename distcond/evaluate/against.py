"""A run beside another one, e.g. the dense model of the same quality."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from distcond.errors import RunError
from distcond.evaluate.quality import Quality, bootstrap
from distcond.opened import OpenedRun, data_differences

RATIOS = (
    *("ponder/steps", "macs_per_position", "macs_per_example", "bytes_touched_per_example", "peak_memory_gib"),
    *("/p50", "/p95", "/p99", "throughput_per_s", "_tenth", "/rare_leaves", "/num_settings_changed", "/retrain_s"),
)
"Ends of the figures that are told as ratios, beside the quality itself."


def check_comparable(run: OpenedRun, other: OpenedRun) -> None:
    """Refuse runs of different validation sets. Raises RunError naming the settings."""
    own, theirs = asdict(run.config.data), asdict(other.config.data)
    if differ := data_differences(run.config, other.config):
        values = "; ".join(f"data.{key}={own[key]} and {theirs[key]}" for key in differ)
        raise RunError(
            f"{run.folder.path} and {other.folder.path} have different data: {values}; give --against a run with the same data."
        )


def compare(own: Mapping[str, Any], other: Mapping[str, Any], quality: Quality, others: Quality) -> dict[str, Any]:
    """against: the other's figures under the same names, `run` among them. against/ratios: this over the other, by name.

    against/difference: of quality, this less the other, and /low, /high of its 95% interval (`bootstrap`), whose examples are
    drawn for both at once: they are the same ones, so that it is narrower than the two intervals apart.
    """
    names = [key for key in own if key == quality.name or (key.endswith(RATIOS) and not key.startswith("control/"))]
    ratios = {key: own[key] / other[key] for key in names if other.get(key)}
    value, count = quality.value - others.value, quality.count
    low, high = bootstrap(value, count)
    difference = {"": float(np.sum(value) / np.sum(count)), "/low": low, "/high": high}
    told = {f"against/difference{end}": figure for end, figure in difference.items()}
    return {"against": dict(other), "against/ratios": ratios, **told}
