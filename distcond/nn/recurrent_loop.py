"""The steps of a recurrent network over whole sequences as one autograd function: modules and autograd cost nothing a step.

What it computes is `Recurrent`'s loop over time with a cell of one dense matrix under `AdaptiveComputation` or
`FixedComputation`, to rounding. The input's part of the matrix is multiplied once for all time steps, not once a ponder step;
the gradient of the matrix is one product at the end, not one a step. Rows that halt leave at once: a row is copied in a
thousandth of the time that its next step takes. In fp32 both passes are one call each with native kernels, and one kernel
each on a GPU that Triton compiles for.

Legend: B sequences, T time steps, I input features, H hidden units, G outputs of the cell's matrix, R rows still running,
S state tensors of the cell.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distcond.nn.cells import CELLS, RecurrentCell, Tensors
from distcond.ops import fused_recurrent, native, native_recurrent

ROWS_AT_ONCE = 8192
"Rows of gradients that are collected before they are multiplied into that of the matrix."


@dataclass(frozen=True, slots=True)
class Plan:
    """How often the cell is applied, and which."""

    cell: type[RecurrentCell]
    max_steps: int
    epsilon: float | None
    "Of Graves 2016; None: `max_steps` for everyone, and the last state comes out."
    records: bool
    "Whether a backward pass follows: only then are steps kept."


class _Step(NamedTuple):
    """One ponder step of the rows still running, as backward needs it."""

    local: Tensor | None
    "int64 [R], places among the rows that began this time step; None: all, in order."
    stay: Tensor | None
    "int64, places among R of those that ran on; None: all of them, or in the last step none."
    before: Tensors
    saved: Tensors
    after: Tensors
    weight: Tensor | None
    "[R], of this step's state in the mean field; None: none, or in the last step all."
    halting: Tensor | None
    "h [R]."
    runs_on: Tensor | None
    "bool [R]."


class RecurrentLoop(torch.autograd.Function):
    """Mean-field outputs of a recurrent cell over sequences; see the module."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        lengths: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        halting_weight: Tensor | None,
        halting_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [B, T, I] or classes [B, T], lengths int64 [B], the cell's matrix [G, I + 1 + H] and bias [G], the halting
        unit's weight [1, H] and bias [1] (None: no halting) -> outputs [B, T, H]; N int64 and R, [B, T], 0 beyond lengths.
        """
        width = weight.shape[0] // plan.cell.gates
        size = weight.shape[1] - width - 1
        given_TBG = _input_part(inputs, weight[:, :size], bias)
        ctx.plan, ctx.size = plan, size
        ctx.save_for_backward(inputs, weight, halting_weight)
        halting = None
        if halting_weight is not None and halting_bias is not None:
            halting = halting_weight[0] / width**0.5, halting_bias
        ctx.whole = _whole(weight[:, size:], given_TBG)
        if ctx.whole is not None:
            name = next(name for name, cell in CELLS.items() if cell is plan.cell)
            options = (plan.max_steps, plan.epsilon or 0.0)
            out = ctx.whole.forward(name, lengths, given_TBG, weight[:, size:], halting, *options, records=plan.records)
        else:
            out = _loop(plan, lengths, given_TBG, weight[:, size:], halting)
        outputs, steps, remainder, ctx.tape = out
        steps = steps.t()
        ctx.mark_non_differentiable(steps)
        return outputs.transpose(0, 1), steps, remainder.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTH: Tensor, _: Tensor, grad_left_BT: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters, and of vectors where they ask for one."""
        _, weight, halting_weight = ctx.saved_tensors
        plan, tape, size = ctx.plan, ctx.tape, ctx.size
        if ctx.whole is not None:
            found = ctx.whole.backward(tape, grad_BTH.transpose(0, 1), grad_left_BT.t())
            return _gradients(ctx, *found)
        total = _Gradients(weight[:, size:], halting_weight)
        grads = tuple(torch.zeros_like(grad_BTH[:, 0]) for _ in range(plan.cell.states))
        given_TBG = weight.new_zeros(grad_BTH.shape[1], len(grad_BTH), weight.shape[0])
        for time in reversed(range(len(tape))):
            rows, record = tape[time]
            grads = (grads[0] + grad_BTH[:, time], *grads[1:])
            if not record:
                continue
            ours = grads if rows is None else tuple(part[rows] for part in grads)
            left = grad_left_BT[:, time] if rows is None else grad_left_BT[rows, time]
            ours, given = _ponder_backward(plan, record, ours, left, total)
            grads = ours if rows is None else tuple(g.index_copy(0, rows, o) for g, o in zip(grads, ours, strict=True))
            if rows is None:
                given_TBG[time] = given
            else:
                given_TBG[time, rows] = given
        total.flush()
        of_rest = torch.cat([total.flag[:, None], total.state], dim=1)
        return _gradients(ctx, given_TBG, of_rest, total.halting, total.halting_bias)


def _loop(
    plan: Plan, lengths: Tensor, given_TBG: Tensor, weight: Tensor, halting: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor | None, list[_Step]]]]:
    """Outputs [T, B, H], N and R [T, B] and the tape, by operators of torch; weight: columns of flag and state."""
    length, batch, _ = given_TBG.shape
    width = weight.shape[1] - 1
    state = tuple(weight.new_zeros(batch, width) for _ in range(plan.cell.states))
    outputs = weight.new_empty(length, batch, width)
    steps = torch.zeros(length, batch, dtype=torch.int64, device=weight.device)
    remainder = weight.new_zeros(length, batch)
    ends = lengths.tolist()
    tape: list[tuple[Tensor | None, list[_Step]]] = []
    for time in range(length):
        rows = None if min(ends) > time else (lengths > time).nonzero()[:, 0]
        begin = state if rows is None else tuple(part[rows] for part in state)
        record: list[_Step] = []
        if len(begin[0]):
            given = given_TBG[time] if rows is None else given_TBG[time, rows]
            mean, taken, left = _ponder(plan, begin, given, weight, halting, record)
            if rows is None:
                state, steps[time], remainder[time] = mean, taken, left
            else:
                state = tuple(part.index_copy(0, rows, new) for part, new in zip(state, mean, strict=True))
                steps[time, rows], remainder[time, rows] = taken, left
        outputs[time] = state[0]
        tape.append((rows, record))
    return outputs, steps, remainder, tape


def _whole(weight: Tensor, given_TBG: Tensor) -> ModuleType | None:
    """What computes a whole pass at once, if anything does; weight: columns of flag and state."""
    if native.computes(weight, given_TBG):
        return native_recurrent
    return fused_recurrent if fused_recurrent.serves(weight, given_TBG) else None


def _gradients(ctx: Any, given_TBG: Tensor, of_rest: Tensor, halting: Tensor, halting_bias: Tensor) -> tuple[Tensor | None, ...]:
    """What `backward` returns, of the gradients of `given`, of the columns of flag and state, and of the scaled halting unit."""
    inputs, weight, halting_weight = ctx.saved_tensors
    given = weight[:, : ctx.size]
    of_inputs, of_matrix = _input_gradient(inputs, given, given_TBG, needs_inputs=ctx.needs_input_grad[2])
    of_weight = torch.cat([of_matrix, of_rest], dim=1)
    of_halting = None if halting_weight is None else halting[None] / halting_weight.shape[1] ** 0.5
    of_bias = None if halting_weight is None else halting_bias
    return None, None, of_inputs, of_weight, given_TBG.sum((0, 1)), of_halting, of_bias


class _Gradients:
    """Sums over all steps: of the matrix' columns for the flag and for the state, and of the halting unit."""

    def __init__(self, weight: Tensor, halting_weight: Tensor | None) -> None:
        self.weight, self.scaled = weight, None if halting_weight is None else halting_weight[0] / halting_weight.shape[1] ** 0.5
        self.flag, self.state = weight.new_zeros(len(weight)), torch.zeros_like(weight[:, 1:])
        self.halting, self.halting_bias = weight.new_zeros(weight.shape[1] - 1), weight.new_zeros(1)
        self._outputs: list[Tensor] = []
        self._states: list[Tensor] = []
        self._rows = 0

    def add(self, output: Tensor, state: Tensor) -> None:
        """Gradient of the matrix' outputs, and the state that it met."""
        self._outputs.append(output)
        self._states.append(state)
        self._rows += len(output)
        if self._rows >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Multiply what was collected."""
        if self._rows:
            self.state.addmm_(torch.cat(self._outputs).t(), torch.cat(self._states))
        self._outputs, self._states, self._rows = [], [], 0


def _ponder(
    plan: Plan,
    state: Tensors,
    given: Tensor,
    weight: Tensor,
    halting: tuple[Tensor, Tensor] | None,
    record: list[_Step],
) -> tuple[Tensors, Tensor, Tensor]:
    """One time step: the mean-field state of its rows, and what each took. given [R, G]; weight: columns of flag and state."""
    count = len(given)
    of_state = weight[:, 1:].t()
    steps, left = torch.full((count,), plan.max_steps, device=given.device), given.new_zeros(count)
    if halting is None:
        for number in range(1, plan.max_steps + 1):
            before, (state, saved) = state, _apply(plan, state, given, weight, of_state, first=number == 1)
            if plan.records:
                record.append(_Step(None, None, before, saved, state, None, None, None))
        return state, steps, left
    assert plan.epsilon is not None
    local: Tensor | None = None
    mean = tuple(torch.zeros_like(part) for part in state)
    spent = left.clone()
    everyone = torch.arange(count, device=given.device)
    for number in range(1, plan.max_steps + 1):
        before = state
        state, saved = _apply(plan, state, given if local is None else given[local], weight, of_state, first=number == 1)
        h = torch.sigmoid(torch.mv(state[0], halting[0]) + halting[1])
        runs_on = ~(spent + h >= 1.0 - plan.epsilon) if number < plan.max_steps else torch.zeros_like(h, dtype=torch.bool)
        part = torch.where(runs_on, h, 1.0 - spent)
        stay = runs_on.nonzero()[:, 0]  # waits for a device
        is_last, is_whole = not len(stay), len(stay) == len(h)
        places = everyone if local is None else local
        for total, new in zip(mean, state, strict=True):
            total.index_add_(0, places, new * part[:, None])
        steps.index_fill_(0, places, number)
        left.index_copy_(0, places, torch.where(runs_on, 0.0, part))
        if plan.records:
            record.append(_Step(local, None if is_last or is_whole else stay, before, saved, state, part, h, runs_on))
        if is_last:
            break
        spent = spent + h
        if not is_whole:
            local, spent, state = places[stay], spent[stay], tuple(new[stay] for new in state)
    return mean, steps, left


def _apply(
    plan: Plan, state: Tensors, given: Tensor, weight: Tensor, of_state: Tensor, *, first: bool
) -> tuple[Tensors, Tensors]:
    output = torch.addmm(given, state[0], of_state)
    if first:
        output += weight[:, 0]
    return plan.cell.pointwise(output, state)


def _ponder_backward(
    plan: Plan, record: list[_Step], grads: Tensors, grad_left: Tensor, total: _Gradients
) -> tuple[Tensors, Tensor]:
    """From gradients of the mean-field state and of R to those of the state before, and of `given`."""
    of_state = total.weight[:, 1:]
    given = torch.zeros(len(grad_left), len(of_state), dtype=grad_left.dtype, device=grad_left.device)
    at_last = grad_left.new_zeros(len(grad_left))  # gradient . state of each row's last step
    carried: Tensors | None = None
    for step in reversed(record):
        if step.weight is None:
            own = carried if carried is not None else grads
        else:
            mine = grads if step.local is None else tuple(part[step.local] for part in grads)
            own = tuple(part * step.weight[:, None] for part in mine)
            if carried is not None and step.stay is None:
                own = tuple(part + more for part, more in zip(own, carried, strict=True))
            elif carried is not None and step.stay is not None:
                own = tuple(part.index_add_(0, step.stay, more) for part, more in zip(own, carried, strict=True))
            own = (own[0] + _halting_gradient(step, mine, grad_left, at_last, total), *own[1:])
        output, before = plan.cell.pointwise_backward(own, step.saved, step.before, step.after)
        total.add(output, step.before[0])
        if step.local is None:
            given += output
        else:
            given.index_add_(0, step.local, output)
        of_first = output @ of_state if before[0] is None else torch.addmm(before[0], output, of_state)
        carried = (of_first, *(part for part in before[1:] if part is not None))
    total.flag += output.sum(0)
    assert carried is not None
    return carried, given


def _halting_gradient(step: _Step, grads: Tensors, grad_left: Tensor, at_last: Tensor, total: _Gradients) -> Tensor:
    """What halting probabilities pass on to the outputs, [R, H] (Graves 2016, equations 14 and 19); N counts as a constant."""
    assert step.halting is not None and step.runs_on is not None and total.scaled is not None
    along = sum(torch.linalg.vecdot(grad, state) for grad, state in zip(grads, step.after, strict=True))
    last, left = (part if step.local is None else part[step.local] for part in (at_last, grad_left))
    last = torch.where(step.runs_on, last, along)
    if step.local is None:
        at_last.copy_(last)
    else:
        at_last.index_copy_(0, step.local, last)
    h = step.halting
    of_logit = torch.where(step.runs_on, along - last - left, 0.0) * h * (1.0 - h)
    total.halting += of_logit @ step.after[0]
    total.halting_bias += of_logit.sum()
    return torch.outer(of_logit, total.scaled)


def _input_part(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight @ input + bias, [T, B, G]."""
    if inputs.dim() == 2:
        return torch.nn.functional.embedding(inputs.t().long(), weight.t()) + bias
    given = torch.addmm(bias, inputs.transpose(0, 1).flatten(0, 1).to(weight.dtype), weight.t())
    return given.view(inputs.shape[1], len(inputs), -1)


def _input_gradient(inputs: Tensor, weight: Tensor, given_TBG: Tensor, *, needs_inputs: bool) -> tuple[Tensor | None, Tensor]:
    """Gradients of vectors, if wanted, and of the columns of the matrix that meet them."""
    flat = given_TBG.flatten(0, 1)
    if inputs.dim() == 2:
        return None, torch.zeros_like(weight.t()).index_add_(0, inputs.t().flatten().long(), flat).t()
    of_weight = flat.t() @ inputs.transpose(0, 1).flatten(0, 1).to(weight.dtype)
    return (flat @ weight).view(given_TBG.shape[0], len(inputs), -1).transpose(0, 1) if needs_inputs else None, of_weight
