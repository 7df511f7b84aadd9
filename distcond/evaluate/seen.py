"""One pass over the validation set: what every position cost, how hard it was, and which leaves it visited.

Legend: E examples of the validation set, B of a batch, T positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distcond.config import Config
from distcond.data.batches import LocalFeeder, num_validation_batches
from distcond.evaluate.visits import Visited, VisitRecorder
from distcond.nn.model import SUMS, Learner
from distcond.positions import Array, Positions, ask

PerExample = Callable[[Any], Array]
"From a Batch to a number for each example, [B], or position, [B, T]."


@dataclass(frozen=True, slots=True)
class Seen:
    """The validation set as a model saw it. Padding is left out."""

    sums: Tensor
    "In the order of SUMS, float64."
    positions: Positions
    marks: dict[str, Array]
    "What was asked of each batch beside: [E] or [E, T], by name."
    visits: dict[str, Visited]
    "By tree layer, if it is known which position a row of it is of."


@torch.no_grad()
def look(learner: Learner, config: Config, feeder: LocalFeeder, marks: dict[str, PerExample] | None = None) -> Seen:
    """Ask a model for the whole validation set, once. marks: what to tell of each batch, from its data alone, by name."""
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    parts: list[Positions] = []
    told: dict[str, list[Array]] = {name: [] for name in marks or {}}
    recorder = VisitRecorder(learner.body)
    try:
        for index in range(num_validation_batches(config, 1)):
            batch = feeder.validation(index)
            recorder.start(torch.from_numpy(batch.lengths), batch.inputs.shape[1])
            sums, positions = ask(learner, batch)
            size = len(positions.valid)
            total += sums
            parts.append(positions)
            recorder.end(size)
            for name, mark in (marks or {}).items():
                told[name].append(mark(batch)[:size])
    finally:
        recorder.remove()
    return Seen(total, Positions.join(parts), {name: np.concatenate(rows) for name, rows in told.items()}, recorder.visited())
