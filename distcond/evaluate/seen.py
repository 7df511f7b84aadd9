"""One pass over the validation set: what every position cost, how hard it was, and which leaves it visited.

Legend: E examples of the validation set, B of a batch, T positions, G targets of a position, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from distcond.config import Config
from distcond.data.batches import LocalFeeder, num_validation_batches
from distcond.evaluate.visits import Visited, VisitRecorder
from distcond.nn.halting import PonderStats
from distcond.nn.model import SUMS, Learner
from distcond.train.state import tensors

Array = np.ndarray
PerExample = Callable[[Any], Array]
"From a Batch to a number for each example, [B], or position, [B, T]."


@dataclass(frozen=True, slots=True)
class Positions:
    """Figures of positions, [E, T] each; of no meaning where `valid` is false."""

    valid: Array
    "bool: inside the sequence."
    asked: Array
    "int64: targets, of which a position may have several, or none."
    wrong: Array
    "int64: targets that were missed."
    nll: Array
    "float64, nats: of all targets."
    entropy: Array
    "float64, nats: of what was predicted for them, whatever they are."
    steps: Array
    "int64: ponder steps that were executed."

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """Those of several batches."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


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
    outputs: list[tuple[Tensor, PonderStats]] = []
    hook = learner.body.register_forward_hook(lambda module, given, output: outputs.append(output))
    recorder = VisitRecorder(learner.body)
    try:
        for index in range(num_validation_batches(config, 1)):
            batch = feeder.validation(index)
            inputs, targets, lengths = tensors(batch, torch.device("cpu"))
            recorder.start(lengths, inputs.shape[1])
            total += learner(inputs, targets, lengths)[1]
            logits, stats = outputs.pop()
            size = int((lengths > 0).sum())  # the rows behind them are padding
            parts.append(_positions(learner, logits[:size], stats.steps.view(inputs.shape[:2])[:size], targets, lengths[:size]))
            recorder.end(size)
            for name, mark in (marks or {}).items():
                told[name].append(mark(batch)[:size])
    finally:
        hook.remove()
        recorder.remove()
    return Seen(total, Positions.join(parts), {name: np.concatenate(rows) for name, rows in told.items()}, recorder.visited())


def _positions(learner: Learner, logits: Tensor, steps_BT: Tensor, targets: Tensor, lengths: Tensor) -> Positions:
    nll_BT, wrong_BTG, asked_BTG = learner.compare(logits, targets[: len(logits)])
    valid_BT = torch.arange(logits.shape[1]) < lengths[:, None]
    asked_BTG = asked_BTG & valid_BT[:, :, None]
    entropy_BTG = _entropy(logits, learner.num_classes)
    figures = (
        valid_BT,
        asked_BTG.sum(2),
        (wrong_BTG & asked_BTG).sum(2),
        torch.where(valid_BT, nll_BT, 0.0).double(),
        torch.where(asked_BTG, entropy_BTG, 0.0).sum(2).double(),
        torch.where(valid_BT, steps_BT, 0),
    )
    return Positions(*(figure.numpy() for figure in figures))


def _entropy(logits: Tensor, num_classes: int) -> Tensor:
    """Of each prediction in nats, [B, T, G]: a distribution over classes, or a coin where there is one."""
    if num_classes == 1:
        p = logits.float().sigmoid()
        both: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
        return both
    log_p: Tensor = logits.unflatten(2, (-1, num_classes)).float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
