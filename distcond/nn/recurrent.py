"""A recurrent network that ponders each element of a sequence (Graves 2016).

Legend: B sequences, T time steps, I input features, H hidden units, O outputs, R rows still running.
"""

import torch
from torch import Tensor, nn

from distcond.nn.cells import RecurrentCell
from distcond.nn.halting import AdaptiveComputation, FixedComputation, PonderStats, State, check_finite, placed
from distcond.nn.recurrent_loop import Plan, RecurrentLoop
from distcond.nn.transformer import VOCABULARY


class Recurrent(nn.Module):
    """Logits at every time step: a cell under a halting module, and a head on the mean-field state.

    num_states: tensors in the cell's state, each [B, width].
    """

    def __init__(self, ponder: nn.Module, width: int, num_states: int, output_size: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.ponder, self.width, self.num_states, self.vocabulary = ponder, width, num_states, vocabulary
        self.head = nn.Linear(width, output_size)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, PonderStats]:
        """Vectors [B, T, I], or bytes or tokens [B, T], and lengths int64 [B] -> logits [B, T, O], stats of all B x T positions.

        Bytes and tokens are one-hot vectors of the vocabulary. All T steps are taken, with no rows where every
        sequence has ended: ranks stay in lockstep over ragged lengths. Stats beyond a sequence's length are zeros.
        """
        if isinstance(self.ponder, AdaptiveComputation | FixedComputation) and _is_plain(self.ponder):
            return self._in_one_loop(self.ponder, inputs, lengths)
        if inputs.dim() == 2:
            inputs = nn.functional.one_hot(inputs.long(), self.vocabulary).to(self.head.weight.dtype)
        batch, length, _ = inputs.shape
        states = tuple(inputs.new_zeros(batch, self.width) for _ in range(self.num_states))
        logits, spent = [], []
        for time in range(length):
            rows = (lengths > time).nonzero()[:, 0]
            running: State = tuple(part[rows] for part in states)
            mean, stats = self.ponder(inputs[rows, time], running if self.num_states > 1 else running[0])
            parts = mean if isinstance(mean, tuple) else (mean,)
            states = tuple(old.index_copy(0, rows, new) for old, new in zip(states, parts, strict=True))
            logits.append(self.head(states[0]))
            spent.append((rows * length + time, stats))
        return torch.stack(logits, dim=1), placed(spent, batch * length, self.head)

    def _in_one_loop(
        self, ponder: AdaptiveComputation | FixedComputation, inputs: Tensor, lengths: Tensor
    ) -> tuple[Tensor, PonderStats]:
        """The same by `RecurrentLoop`."""
        cell = ponder.cell
        assert isinstance(cell, RecurrentCell) and isinstance(cell.linear, nn.Linear)
        weights = (cell.linear.weight, cell.linear.bias)
        if isinstance(ponder, FixedComputation):
            plan = Plan(type(cell), ponder.num_steps, None, torch.is_grad_enabled())
            states, steps, remainder = RecurrentLoop.apply(plan, lengths, inputs, *weights, None, None)  # type: ignore[no-untyped-call]
        else:
            plan, halting = Plan(type(cell), ponder.max_steps, ponder.epsilon, torch.is_grad_enabled()), ponder.halting
            given = (plan, lengths, inputs, *weights, halting.weight, halting.bias)
            states, steps, remainder = RecurrentLoop.apply(*given)  # type: ignore[no-untyped-call]
            if not ponder.skips_nan:
                check_finite(remainder.flatten())
        steps, remainder = steps.flatten(), remainder.flatten()
        return self.head(states), PonderStats(steps, remainder, steps + remainder)


def _is_plain(ponder: AdaptiveComputation | FixedComputation) -> bool:
    """Whether `RecurrentLoop` serves: a cell of ours with a dense fp32 or fp64 matrix, whose steps no other rank waits for."""
    if type(ponder) not in {AdaptiveComputation, FixedComputation} or getattr(ponder, "lockstep", None) is not None:
        return False
    cell = ponder.cell
    if not isinstance(cell, RecurrentCell) or type(cell.linear) is not nn.Linear:
        return False
    weight = cell.linear.weight
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for module in (cell, cell.linear) for name in hooks):
        return False  # whoever hooks a module wants it called; NOTE: so does ZeRO 3, whose parameters are whole only then
    return weight.dtype in {torch.float32, torch.float64} and not torch.is_autocast_enabled(weight.device.type)
