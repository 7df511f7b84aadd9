"""The same checkpoint with a fixed number of ponder steps: the control beside what halting saves.

Legend: B rows of the batch, I input features.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distcond.nn.halting import AdaptiveComputation, Pondering, PonderStats, Running, State, add_weighted, like

MOST_COUNTED = 8
"Numbers of steps up to this one are tried one by one; above, each is twice the last."


class ForcedComputation(nn.Module):
    """A trained halting module, of which every row takes exactly `num_steps` steps.

    Of `AdaptiveComputation` the mean-field state comes out, each step weighed by its halting probability as long as that lasts:
    the step at which a row would have halted has what is left, later ones nothing, and the last step whatever is left then. It
    is what a row gives that halts at `num_steps`, and what the model was trained to read; a state of one step it was not. Of
    `PonderNet`, whose prediction is that of one step, the state after `num_steps` comes out.
    """

    def __init__(self, ponder: Pondering, num_steps: int) -> None:
        super().__init__()
        self.cell, self.halting, self.epsilon, self.num_steps = ponder.cell, ponder.halting, ponder.epsilon, num_steps
        self.mixes = isinstance(ponder, AdaptiveComputation)

    def forward(self, x: Tensor, state: State) -> tuple[State, PonderStats]:
        """x [B, I], state of B rows -> state of B rows, and what each row spent."""
        running = Running(self.cell, x, state, None)
        mean = running.new_sums()
        spent = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        for number in range(1, self.num_steps + 1):
            parts = running.step()
            if self.mixes:
                h = self.halting(parts[0])
                is_last = (spent + h >= 1.0 - self.epsilon) | (number == self.num_steps)
                weight = torch.where(is_last, 1.0 - spent, h)
                mean, spent = add_weighted(mean, running.rows, parts, weight), spent + weight
        steps = torch.full_like(running.rows, self.num_steps)
        remainder = torch.zeros_like(spent)
        last = running.rounded(mean) if self.mixes else running.state
        return like(state, last), PonderStats(steps, remainder, steps + remainder)


@contextmanager
def forced(body: nn.Module, num_steps: int) -> Iterator[None]:
    """Meanwhile, every halting module of a model takes `num_steps`."""
    found = {name: module for name, module in body.named_modules() if isinstance(module, Pondering)}
    try:
        for name, ponder in found.items():
            _set(body, name, ForcedComputation(ponder, num_steps).eval())
        yield
    finally:
        for name, ponder in found.items():
            _set(body, name, ponder)


def numbers_to_try(mean: float, most: int) -> list[int]:
    """Fixed numbers of steps beside halting that takes `mean` steps and at most `most`: 1, 2, ... to either side of the mean,
    by doubling above MOST_COUNTED, and the most.
    """
    below, above = math.floor(mean), math.ceil(mean)
    counted = range(1, min(above, MOST_COUNTED) + 1)
    doubled = [MOST_COUNTED << power for power in range(1, above.bit_length()) if MOST_COUNTED << power < above]
    return sorted({*counted, *doubled, max(1, below), max(1, above), most})


def _set(body: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(body.get_submodule(parent), last, module)
