"""A budget of ponder steps: the penalty that keeps their mean at a target, found while training. Needs no torch."""

import math
from collections.abc import Mapping
from typing import Any

GAIN = 20.0
"Proportional gain: one twentieth too many steps multiply the penalty by e."
INTEGRAL_GAIN = 240.0
"""Integral gain, per unit of learning rate: under Adam the logit of halting moves in proportion to it. At half of GAIN and a
quarter of this, which is as well damped, steps overshoot 1.7 times as far where a model begins to ponder."""
MARGIN = 0.01
"Aimed at is this share above the target: where every row takes exactly the target, the penalty then fades, not grows."
LOWEST, START, HIGHEST = math.log(1e-5), math.log(1e-3), math.log(10.0)
"Bounds and start of the integral part, a logarithm; its bounds are what keeps it from winding up."
MOMENTUM = 0.99
"Of the running mean of the loss."


class StepBudget:
    """Controls the weight of the ponder cost in a loss so that the mean of the executed steps does not exceed a target.

    Projected dual ascent on the constraint, in the form of proportional-integral control: the penalty is the running mean
    of the size of the task loss times exp(integral + GAIN x error), where error is the relative excess of the executed steps.
    As it is a share of the loss and grows by factors, no scale is to be set. It is above 0, and next to nothing where
    training ponders less than the target by itself. There is no momentum on the dual.

    Use: loss = task loss + budget.penalty x ponder cost, both per position; after each update, `commit`.
    Raises ValueError where target_steps is below 1.
    """

    def __init__(self, target_steps: float) -> None:
        if not target_steps >= 1:
            raise ValueError(f"target_steps={target_steps} is below 1, but every row takes a step; use 1 or more")
        self.target_steps = target_steps
        self.integral, self.mean_loss = START, math.nan
        self.penalty = 0.0
        "Weight of the ponder cost in the next loss, nats a step; >= 0."

    def commit(self, steps: float, loss: float, lr: float) -> None:
        """After an update: the mean executed steps and task loss of a position in its batch, of all ranks; its learning rate."""
        if not (math.isfinite(loss) and math.isfinite(steps)):
            return  # such an update is not applied
        size = abs(loss)  # that of a density may be below 0
        self.mean_loss = size if math.isnan(self.mean_loss) else MOMENTUM * self.mean_loss + (1 - MOMENTUM) * size
        error = steps / self.target_steps - 1 - MARGIN
        self.integral = min(max(self.integral + INTEGRAL_GAIN * lr * error, LOWEST), HIGHEST)
        self.penalty = self.mean_loss * math.exp(min(self.integral + GAIN * error, HIGHEST))

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint holds, as JSON can; mean_loss: None before the first `commit`."""
        mean_loss = None if math.isnan(self.mean_loss) else self.mean_loss
        return {"integral": self.integral, "mean_loss": mean_loss, "penalty": self.penalty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.integral, self.penalty = state["integral"], state["penalty"]
        self.mean_loss = math.nan if state["mean_loss"] is None else state["mean_loss"]
