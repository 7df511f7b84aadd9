"""What every position of some examples costs a model, and how hard it finds it: `evaluate` and `report` look at the same.

Legend: E examples, B of a batch, T positions, G targets of a position, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from distcond.data.batch import Batch
from distcond.nn.halting import PonderStats
from distcond.nn.model import Learner
from distcond.train.state import tensors

Array = np.ndarray


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

    @property
    def loss_bits(self) -> Array:
        """Of all targets."""
        return np.asarray(self.nll / math.log(2))

    @property
    def entropy_bits(self) -> Array:
        """Of what was predicted for them."""
        return np.asarray(self.entropy / math.log(2))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Those of several batches."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@torch.no_grad()
def ask(learner: Learner, batch: Batch) -> tuple[Tensor, Positions]:
    """Ask a model for a batch: the learner's sums, in the order of SUMS, and its positions; rows that are padding are none."""
    outputs: list[tuple[Tensor, PonderStats]] = []
    hook = learner.body.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        inputs, targets, lengths = tensors(batch, torch.device("cpu"))
        _, sums = learner(inputs, targets, lengths)
    finally:
        hook.remove()
    ((logits, stats),) = outputs
    size = int((lengths > 0).sum())
    return sums, _positions(learner, logits[:size], stats.steps.view(inputs.shape[:2])[:size], targets[:size], lengths[:size])


def _positions(learner: Learner, logits: Tensor, steps_BT: Tensor, targets: Tensor, lengths: Tensor) -> Positions:
    nll_BT, wrong_BTG, asked_BTG = learner.compare(logits, targets)
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
