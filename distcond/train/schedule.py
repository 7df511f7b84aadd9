"""The learning rate of a step."""

import math

from distcond.config import OptimConfig, Schedule


def learning_rate(optim: OptimConfig, step: int, max_steps: int) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up to `optim.lr`, then constant, or cosine to zero at max_steps."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == Schedule.constant:
        return optim.lr
    share = (step - optim.warmup_steps) / max(1, max_steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
