"""Two runs beside each other."""

import numpy as np
import pytest

from distcond.evaluate.against import compare
from distcond.evaluate.quality import Quality


def test_the_difference_of_two_runs_is_known_better_than_either() -> None:
    rng = np.random.default_rng(0)
    hard_E, count_E = rng.gamma(4.0, size=100), np.full(100, 2.0)
    own, other = (Quality("val/bpb", hard_E * factor + rng.random(100) / 10, count_E, hard_E[:, None]) for factor in (1.0, 1.1))
    figures = {"val/bpb": own.mean(), "macs_per_example": 30.0, "val/bpb/hardest_tenth": 1.0, "control/steps_p": 0.1, "step": 3}
    result = compare(figures, {**figures, "run": "dense", "val/bpb": other.mean(), "macs_per_example": 20.0}, own, other)
    assert result["against"]["run"] == "dense" and result["against/difference"] == pytest.approx(own.mean() - other.mean())
    low, high = result["against/difference/low"], result["against/difference/high"]
    assert low < result["against/difference"] < high < 0
    assert 3 * (high - low) < min(np.ptp(own.interval()), np.ptp(other.interval()))
    assert result["against/ratios"] == {
        "val/bpb": own.mean() / other.mean(),
        "macs_per_example": 1.5,
        "val/bpb/hardest_tenth": 1.0,
    }
