"""Ponder steps: how often a cell is applied to each row of a batch, and what comes out.

Legend: B rows of the batch, R rows still running, I input features, N steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

State = Tensor | tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Tensor], State]


class AnyRank(Protocol):
    """The one collective that lockstep needs."""

    def max_(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, in place."""
        ...


@dataclass(slots=True)
class PonderStats:
    """What each row spent."""

    steps: Tensor
    "N, int64 [B]."
    remainder: Tensor
    "R, [B]; 0 where the number of steps is not the row's own choice."
    ponder_cost: Tensor
    "rho = N + R, [B]; differentiable through R."


class AdaptiveComputation(nn.Module):
    """Applies a cell until each row has halted, and returns the mean-field state (Graves 2016, arXiv 1603.08983).

    cell(x, state, rows) -> state: x [R, I + 1], whose last column is 1 on a row's first step and 0 afterwards; state a
    tensor [R, state_size] or a tuple of tensors of the R rows still running; rows int64 [R], their places in the batch.
    The halting unit reads the first tensor of the state. Rows that have halted leave the batch.

    lockstep: set where the cell contains collective calls; ranks then all take the number of steps of the slowest one,
    with no rows where theirs have halted. Such empty steps stay linked to the result, so that backward runs them too.
    """

    def __init__(
        self,
        cell: Cell,
        state_size: int,
        max_steps: int = 100,
        epsilon: float = 0.01,
        halting_bias: float = 1.0,
    ) -> None:
        super().__init__()
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps} is below 1; use 1 or more")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon={epsilon} is outside (0, 1); Graves 2016 uses 0.01")
        self.cell, self.max_steps, self.epsilon = cell, max_steps, epsilon
        self.halting = HaltingUnit(state_size, halting_bias)
        self.lockstep: AnyRank | None = None

    def forward(self, x: Tensor, state: State) -> tuple[State, PonderStats]:
        """x [B, I], state of B rows -> mean-field state of B rows, and what each row spent."""
        batch = len(x)
        rows = torch.arange(batch, device=x.device)
        running: tuple[Tensor, ...] = _as_tuple(state)
        mean = tuple(torch.zeros_like(part) for part in running)
        budget = x.new_zeros(batch, dtype=torch.promote_types(x.dtype, torch.float32))
        steps, remainder = torch.zeros_like(rows), torch.zeros_like(budget)
        for number in range(1, self.max_steps + 1):
            running = _as_tuple(self.cell(_with_flag(x[rows], first=number == 1), _like(state, running), rows))
            h = self.halting(running[0])
            spent = budget[rows]
            halts = (spent.detach() + h.detach() >= 1.0 - self.epsilon) | (number == self.max_steps)
            weight = torch.where(halts, 1.0 - spent, h)
            mean = tuple(
                total.index_add(0, rows, part * weight.to(part.dtype).view(-1, *[1] * (part.dim() - 1)))
                for total, part in zip(mean, running, strict=True)
            )
            steps = steps.index_fill(0, rows, number)
            remainder = remainder.index_add(0, rows, torch.where(halts, weight, 0.0))
            budget = budget.index_add(0, rows, weight)
            still = ~halts
            if not self._anyone(still):
                break
            if not bool(still.all()):
                rows, running = rows[still], tuple(part[still] for part in running)
        return _like(state, mean), PonderStats(steps, remainder, steps + remainder)

    def _anyone(self, still: Tensor) -> bool:
        """Whether a row runs on, here or (in lockstep) on any rank."""
        anyone = still.any().int()
        return bool(anyone if self.lockstep is None else self.lockstep.max_(anyone))


class FixedComputation(nn.Module):
    """Applies a cell the same number of times to every row; the last state comes out. The control for halting."""

    def __init__(self, cell: Cell, num_steps: int) -> None:
        super().__init__()
        self.cell, self.num_steps = cell, num_steps

    def forward(self, x: Tensor, state: State) -> tuple[State, PonderStats]:
        """x [B, I], state of B rows -> state after num_steps, and what each row spent (remainder 0)."""
        rows = torch.arange(len(x), device=x.device)
        for number in range(1, self.num_steps + 1):
            state = self.cell(_with_flag(x, first=number == 1), state, rows)
        zeros = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        steps = torch.full_like(rows, self.num_steps)
        return state, PonderStats(steps, zeros, steps + zeros)


class HaltingUnit(nn.Module):
    """h = sigmoid(w . s / sqrt(state_size) + bias), [R], computed in fp32 at least: its sums decide the number of steps.

    w starts at zero, so that every row starts with the number of steps that the bias alone gives. Without the root, one step
    of Adam moves the logit in proportion to the width, and a residual stream of width 128 falls to one step in 100 updates.
    """

    def __init__(self, state_size: int, bias: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, state_size))
        self.bias = nn.Parameter(torch.full((1,), bias))

    def forward(self, state: Tensor) -> Tensor:
        """Halting probability of each row."""
        dtype = torch.promote_types(state.dtype, torch.float32)
        with torch.autocast(state.device.type, enabled=False):
            scaled = state.to(dtype) / state.shape[1] ** 0.5
            return torch.sigmoid(nn.functional.linear(scaled, self.weight.to(dtype), self.bias.to(dtype)))[:, 0]


def _as_tuple(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _like(example: State, parts: tuple[Tensor, ...]) -> State:
    return parts if isinstance(example, tuple) else parts[0]


def _with_flag(x: Tensor, *, first: bool) -> Tensor:
    """The input with the column that tells a row's first step from its repeats."""
    return torch.cat([x, x.new_full((len(x), 1), float(first))], dim=1)
