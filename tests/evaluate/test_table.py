"""The screen's view: figures of the same kind stand below each other."""

import numpy as np

from distcond.evaluate.chance import steps_beside_chance
from distcond.evaluate.table import table
from distcond.positions import Positions


def test_steps_beside_chance_are_a_line_for_each_measure_of_difficulty() -> None:
    rng = np.random.default_rng(0)
    asked, steps, loss = np.ones((8, 6), np.int64), rng.integers(1, 4, (8, 6)), rng.random((8, 6))
    seen = Positions(asked > 0, asked, 0 * asked, loss, loss[::-1], steps)
    result = {"run": "x", "hardest_by": "zlib", "val/bpb": 2.0, "control/fixed_steps": {"1": 2.5}} | steps_beside_chance(seen)
    lines = table(result).splitlines()
    (head,) = (line for line in lines if "by chance, within sequences" in line)
    for of in ("loss", "entropy"):
        (line,) = (line for line in lines if line.startswith(f"steps with {of}"))
        low, high, p = (result[f"control/steps_{of}_within_sequences_{end}"] for end in ("low", "high", "p"))
        assert line[head.index("by chance, within") :].startswith(f"{low:+.3f} to {high:+.3f} (p {p:.3g})")
        assert line[head.index("rank") :].startswith(f"{result[f'control/steps_{of}_rank_correlation']:+.3f}")
    assert not [line for line in lines if line.startswith("control/steps_")]
    assert "control/fixed_steps  1: 2.5" in lines
