"""Ponder steps: how often a cell is applied to each row of a batch, and what comes out.

Legend: B rows of the batch, R rows still running, I input features, N steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
class Drafts:
    """A state after each step of each row, in any order, of which every one makes a prediction (PonderNet, in training)."""

    value: Tensor
    "States [S, state_size], or what a head has made of them."
    rows: Tensor
    "int64 [S], the place of each one's row."
    weight: Tensor
    "p_n [S], which sum to one over the steps of a row; differentiable."


@dataclass(slots=True)
class PonderStats:
    """What each row spent."""

    steps: Tensor
    "N, int64 [B]: steps that were executed."
    remainder: Tensor
    "R, [B]: the weight of the last step; 0 where the number of steps is not the row's own choice."
    ponder_cost: Tensor
    "[B], what a penalty weighs: rho = N + R, differentiable through R (Graves), or the mean of p (PonderNet)."
    drafts: Drafts | None = None
    "PonderNet in training: the predictions that the loss is made of."

    def read(self, head: Callable[[Tensor], Tensor]) -> "PonderStats":
        """The same, with what a head makes of the state of every draft."""
        if self.drafts is None:
            return self
        return replace(self, drafts=replace(self.drafts, value=head(self.drafts.value)))


class Running:
    """The rows of a batch that have not halted, and their states. Rows that halt leave: time follows the steps of each.

    lockstep: see `AdaptiveComputation`.
    """

    def __init__(self, cell: Cell, x: Tensor, state: State, lockstep: AnyRank | None) -> None:
        self._cell, self._x, self._example, self._lockstep = cell, x, state, lockstep
        self.state = _as_tuple(state)
        if any(len(part) != len(x) for part in self.state):
            raise ValueError(f"x has {len(x)} rows, the state has {_shapes(self.state)}; both need a row for each of the batch")
        self.rows = torch.arange(len(x), device=x.device)
        "int64 [R], places of the running rows in the batch."
        self.number = 0
        "Steps done."

    def step(self) -> tuple[Tensor, ...]:
        """Apply the cell once to all running rows; their states."""
        self.number += 1
        x = _with_flag(self._x[self.rows], first=self.number == 1)
        after = _as_tuple(self._cell(x, like(self._example, self.state), self.rows))
        if [part.shape for part in after] != [part.shape for part in self.state]:
            raise ValueError(
                f"the cell was given a state of {_shapes(self.state)} and returned {_shapes(after)}; "
                "it must return as many tensors, of the same shapes"
            )
        self.state = after
        return after

    def new_sums(self) -> tuple[Tensor, ...]:
        """Zeros in which `add_weighted` adds up states of all rows, in fp32 at least: many small weights drift in bf16."""
        return tuple(torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32)) for part in self.state)

    def new_shares(self) -> Tensor:
        """A zero for each row of the batch, [B], in the longest precision of input and state, fp32 at least."""
        dtype = torch.promote_types(self._x.dtype, torch.float32)
        for part in self.state:
            dtype = torch.promote_types(dtype, part.dtype)
        return self._x.new_zeros(len(self._x), dtype=dtype)

    def rounded(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Such sums in the precision in which the cell returned its last state."""
        return tuple(total.to(part.dtype) for total, part in zip(sums, self.state, strict=True))

    def keep(self, still: Tensor) -> bool:
        """Let the rows that are not `still` running (bool [R]) leave; whether any runs on, here or in lockstep on any rank."""
        anyone = still.any().int()
        if not bool(anyone if self._lockstep is None else self._lockstep.max_(anyone)):
            return False
        if not bool(still.all()):
            self.rows, self.state = self.rows[still], tuple(part[still] for part in self.state)
        return True


class Pondering(nn.Module):
    """A cell, and a unit that decides after each step which rows halt: what `AdaptiveComputation` and `PonderNet` share."""

    def __init__(self, cell: Cell, state_size: int, max_steps: int, epsilon: float, halting_bias: float) -> None:
        super().__init__()
        check_options(max_steps, epsilon)
        self.cell, self.max_steps, self.epsilon = cell, max_steps, epsilon
        self.halting = HaltingUnit(state_size, halting_bias)
        self.lockstep: AnyRank | None = None
        self.skips_nan = False


class AdaptiveComputation(Pondering):
    """Applies a cell until each row has halted, and returns the mean-field state (Graves 2016, arXiv 1603.08983).

    cell(x, state, rows) -> state: x [R, I + 1], whose last column is 1 on a row's first step and 0 afterwards; state a
    tensor [R, state_size] or a tuple of tensors of the R rows still running; rows int64 [R], their places in the batch.
    The halting unit reads the first tensor of the state. Rows that have halted leave the batch.

    lockstep: set where the cell contains collective calls; ranks then all take the number of steps of the slowest one,
    with no rows where theirs have halted. Such empty steps stay linked to the result, so that backward runs them too.
    skips_nan: NaN where a halting probability is NaN, for whoever drops such a batch; else that raises ValueError. So do a
    state that the cell returns in other shapes, and options outside their range.
    """

    def __init__(
        self,
        cell: Cell,
        state_size: int,
        max_steps: int = 100,
        epsilon: float = 0.01,
        halting_bias: float = 1.0,
    ) -> None:
        super().__init__(cell, state_size, max_steps, epsilon, halting_bias)

    def forward(self, x: Tensor, state: State) -> tuple[State, PonderStats]:
        """x [B, I], state of B rows -> mean-field state of B rows, and what each row spent."""
        running = Running(self.cell, x, state, self.lockstep)
        mean = running.new_sums()
        budget = running.new_shares()
        steps, remainder = torch.zeros_like(running.rows), torch.zeros_like(budget)
        for number in range(1, self.max_steps + 1):
            parts, rows = running.step(), running.rows
            h = self.halting(parts[0]).to(budget.dtype)
            spent = budget[rows]
            halts = (spent.detach() + h.detach() >= 1.0 - self.epsilon) | (number == self.max_steps)
            weight = torch.where(halts, 1.0 - spent, h)
            mean = add_weighted(mean, rows, parts, weight)
            steps = steps.index_fill(0, rows, number)
            remainder = remainder.index_add(0, rows, torch.where(halts, weight, 0.0))
            budget = budget.index_add(0, rows, weight)
            if not running.keep(~halts):
                break
        if not self.skips_nan:
            check_finite(remainder)
        return like(state, running.rounded(mean)), PonderStats(steps, remainder, steps + remainder)


class FixedComputation(nn.Module):
    """Applies a cell the same number of times to every row; the last state comes out. The control for halting."""

    def __init__(self, cell: Cell, num_steps: int) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} is below 1; use 1 or more")
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
        self.bias = nn.Parameter(torch.full((1,), float(bias)))

    def forward(self, state: Tensor) -> Tensor:
        """Halting probability of each row of [R, state_size]."""
        size = self.weight.shape[1]
        if state.dim() != 2 or state.shape[1] != size:
            raise ValueError(f"the first tensor of the state is {list(state.shape)}; halting needs [rows, state_size={size}]")
        dtype = torch.promote_types(state.dtype, torch.float32)
        with torch.autocast(state.device.type, enabled=False):
            scaled = state.to(dtype) / state.shape[1] ** 0.5
            return torch.sigmoid(nn.functional.linear(scaled, self.weight.to(dtype), self.bias.to(dtype)))[:, 0]


def join(drafts: list[Drafts]) -> Drafts:
    """All of them as one; at least one."""
    return Drafts(*(torch.cat([getattr(draft, name) for draft in drafts]) for name in ("value", "rows", "weight")))


def placed(spent: list[tuple[Tensor, PonderStats]], size: int, head: Callable[[Tensor], Tensor]) -> PonderStats:
    """Stats of rows that pondered apart, among `size` positions, and what a head reads in their drafts.

    spent: at least one; the places int64 [R] of each one's rows, which differ, and its stats. Zeros where no row has its place.
    """
    places = torch.cat([rows for rows, _ in spent])
    parts = [torch.cat([getattr(stats, name) for _, stats in spent]) for name in ("steps", "remainder", "ponder_cost")]
    steps, remainder, cost = (part.new_zeros(size).index_copy(0, places, part) for part in parts)
    drafts = [replace(stats.drafts, rows=rows[stats.drafts.rows]) for rows, stats in spent if stats.drafts is not None]
    return PonderStats(steps, remainder, cost, join(drafts) if drafts else None).read(head)


def check_options(max_steps: int, epsilon: float) -> None:
    """Refuse options outside their range. Raises ValueError."""
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps} is below 1; use 1 or more")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon} is outside (0, 1); e.g. 0.01 (Graves 2016) or 0.05 (Banino et al. 2021)")


def check_finite(remainder: Tensor) -> None:
    """Refuse halting probabilities that were NaN, which leave a NaN in their row's remainder. Raises ValueError."""
    count = int(torch.isnan(remainder).sum())
    if count:
        raise ValueError(
            f"halting probabilities are NaN in {count} of {len(remainder)} rows; look for NaN or infinity in the input and "
            "the weights, or lower the learning rate"
        )


def add_weighted(total: tuple[Tensor, ...], rows: Tensor, parts: tuple[Tensor, ...], weight: Tensor) -> tuple[Tensor, ...]:
    """total[rows] += weight * part, for each tensor of a state; weight [R]. In the longer precision of the two tensors."""
    sums = []
    for sum_, part in zip(total, parts, strict=True):
        dtype = torch.promote_types(sum_.dtype, part.dtype)  # autocast: a cell returns bf16 for an fp32 state
        weighted = part * weight.to(dtype).view(-1, *[1] * (part.dim() - 1))
        sums.append(sum_.to(dtype).index_add(0, rows, weighted))
    return tuple(sums)


def _as_tuple(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def like(example: State, parts: tuple[Tensor, ...]) -> State:
    """Parts as the kind of state that the example is: a tensor or a tuple of them."""
    return parts if isinstance(example, tuple) else parts[0]


def _with_flag(x: Tensor, *, first: bool) -> Tensor:
    """The input with the column that tells a row's first step from its repeats."""
    return torch.cat([x, x.new_full((len(x), 1), float(first))], dim=1)


def _shapes(state: tuple[Tensor, ...]) -> str:
    return " and ".join(str(list(part.shape)) for part in state)
