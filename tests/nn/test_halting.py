"""AdaptiveComputation against a loop over single rows; what the cell is shown; ranks in lockstep."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from distcond.nn import AdaptiveComputation, FixedComputation
from distcond.nn.functional import act_weights
from distcond.nn.halting import HaltingUnit
from tests.trees import seed_cpu

EXACT = {"rtol": 0, "atol": 1e-12}  # float64; mean fields of at most 7 states of size 1, gradients of 12 rows x 7 steps
BATCH, INPUTS, WIDTH = 12, 3, 5


class OneTensor(nn.Module):
    """s' = tanh(W [x, s] + table[row])."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS + 1 + WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(BATCH, WIDTH))

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        return torch.tanh(self.linear(torch.cat([x, state], dim=1)) + self.table[rows])


class Plain(nn.Module):
    """s' = tanh(W [x, s]), which autocast turns into bf16 whatever the state was."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS + 1 + WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        return torch.tanh(self.linear(torch.cat([x, state], dim=1)))


class TwoTensors(nn.Module):
    """A state of two tensors, one of them a matrix per row, each of which reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = OneTensor()
        self.mix = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        output, memory = state
        memory = torch.tanh(memory + self.mix * output[:, None])
        return self.inner(x, output + memory.sum(1), rows), memory


def make_ponder(cell: nn.Module, max_steps: int = 7, epsilon: float = 0.01) -> AdaptiveComputation:
    ponder = AdaptiveComputation(cell, WIDTH, max_steps, epsilon, halting_bias=-1.0).double()
    with torch.no_grad():
        ponder.halting.weight.copy_(torch.linspace(-2, 2, WIDTH))
    return ponder


def make_input(cell: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
    x = torch.randn(BATCH, INPUTS, dtype=torch.float64)
    state = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    memory = torch.randn(BATCH, 2, WIDTH, dtype=torch.float64)
    return x, (state, memory) if isinstance(cell, TwoTensors) else (state,)


def row_by_row(ponder: AdaptiveComputation, x: Tensor, state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    """Every row alone, all of max_steps steps, weighted afterwards: state, steps, remainder, cost."""
    means, all_steps, remainders = [], [], []
    for row in range(len(x)):
        part = tuple(tensor[row : row + 1] for tensor in state)
        states, h = [], []
        for number in range(1, ponder.max_steps + 1):
            flag = torch.full((1, 1), float(number == 1), dtype=x.dtype)
            out = ponder.cell(torch.cat([x[row : row + 1], flag], dim=1), part if len(part) > 1 else part[0], torch.tensor([row]))
            part = out if isinstance(out, tuple) else (out,)
            states.append(part)
            h.append(torch.sigmoid(part[0] / WIDTH**0.5 @ ponder.halting.weight[0] + ponder.halting.bias[0]))
        weights, steps, remainder = act_weights(torch.stack(h, dim=1), ponder.epsilon)
        means.append([sum(w * s for w, s in zip(weights[0], tensors, strict=True)) for tensors in zip(*states, strict=True)])
        all_steps.append(steps)
        remainders.append(remainder)
    mean = tuple(torch.cat(tensors) for tensors in zip(*means, strict=True))
    steps, remainder = torch.cat(all_steps), torch.cat(remainders)
    return mean, (steps,), (remainder,), (steps + remainder,)


@pytest.mark.parametrize("max_steps", [1, 2, 7])
@pytest.mark.parametrize("epsilon", [0.01, 0.3])
@pytest.mark.parametrize("make_cell", [OneTensor, TwoTensors])
def test_equals_each_row_pondered_alone(make_cell: Callable[[], nn.Module], epsilon: float, max_steps: int) -> None:
    seed_cpu(0)
    ponder = make_ponder(make_cell(), max_steps, epsilon)
    x, state = make_input(ponder.cell)
    leaves = [x.requires_grad_(), *(part.requires_grad_() for part in state), *ponder.parameters()]
    results = []
    for mine in (True, False):
        if mine:
            out, stats = ponder(x, state if len(state) > 1 else state[0])
            mean = out if isinstance(out, tuple) else (out,)
            assert isinstance(out, tuple) == (len(state) > 1)
            steps, remainder, cost = stats.steps, stats.remainder, stats.ponder_cost
        else:
            mean, (steps,), (remainder,), (cost,) = row_by_row(ponder, x, state)
        loss = sum((part * torch.linspace(-1, 1, part.numel(), dtype=x.dtype).view_as(part)).sum() for part in mean)
        grads = torch.autograd.grad(loss + 0.3 * cost.sum() + 0.1 * remainder.square().sum(), leaves, allow_unused=max_steps == 1)
        results.append((mean, steps, remainder, cost, [grad if grad is not None else torch.zeros(()) for grad in grads]))
    torch.testing.assert_close(results[0], results[1], **EXACT)
    steps = results[0][1]
    assert steps.dtype == torch.int64 and (max_steps < 3 or len(steps.unique()) > 2)  # the rows halted apart


def test_gradient_of_the_halting_probabilities_is_equation_19() -> None:
    """dL/dh^n = dL/ds . (s^n - s^N) - tau for n < N, and 0 at n = N; the states do not depend on h here."""
    steps, tau, rows = 6, 0.7, 9
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(rows, steps, generator=generator, dtype=torch.float64).mul_(0.6).requires_grad_()
    given = torch.randn(steps, rows, 4, generator=generator, dtype=torch.float64)
    upstream = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    count = iter(range(steps))

    def cell(x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        number = next(count)
        logit = torch.logit(h[rows, number])  # undone by the halting unit
        return torch.cat([logit[:, None], given[number, rows]], dim=1)

    ponder = AdaptiveComputation(cell, 5, steps, halting_bias=0.0).double()
    with torch.no_grad():
        ponder.halting.weight[0, 0] = 5**0.5
    state, stats = ponder(torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(rows, 5, dtype=torch.float64))
    loss = (upstream * state[:, 1:]).sum() + tau * stats.ponder_cost.sum()
    (grad,) = torch.autograd.grad(loss, h)
    for row, last in enumerate(stats.steps.tolist()):
        for n in range(1, steps + 1):
            expected = float(upstream[row] @ (given[n - 1, row] - given[last - 1, row]) - tau) if n < last else 0.0
            assert abs(float(grad[row, n - 1]) - expected) < 1e-12
    assert len(stats.steps.unique()) > 2


@dataclass
class Recorder:
    """A cell that notes what it is shown."""

    step: Callable[[Tensor, Tensor], Tensor]
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        self.seen.append((x, state, rows))
        return self.step(state, rows)


def countdown(state: Tensor, rows: Tensor) -> Tensor:
    """With `deciding`, a row that starts at k halts at step k."""
    return state - 1.0


def deciding(cell: Callable[..., Tensor], max_steps: int = 100) -> AdaptiveComputation:
    """Halts a row, surely, once its state is 0 or below; before that hardly a probability is spent."""
    ponder = AdaptiveComputation(cell, 1, max_steps, halting_bias=20.0).double()
    with torch.no_grad():
        ponder.halting.weight.fill_(-60.0)
    return ponder


def test_the_cell_is_shown_the_running_rows_their_places_and_a_flag_on_the_first_step_only() -> None:
    wanted = torch.tensor([3.0, 1.0, 2.0, 5.0, 1.0], dtype=torch.float64)
    cell = Recorder(countdown)
    x = torch.arange(10.0, dtype=torch.float64).view(5, 2)
    _, stats = deciding(cell)(x, wanted[:, None])
    assert stats.steps.tolist() == wanted.tolist()
    assert len(cell.seen) == 5  # as many calls as the slowest row, and with them only the rows that run
    for number, (shown, state, rows) in enumerate(cell.seen, start=1):
        assert rows.tolist() == [row for row in range(5) if wanted[row] >= number]
        assert torch.equal(shown[:, :2], x[rows])
        assert shown[:, 2].tolist() == [float(number == 1)] * len(rows)
        assert torch.equal(state[:, 0], wanted[rows] - (number - 1))


def test_an_empty_batch_takes_one_step_and_stays_empty() -> None:
    cell = Recorder(countdown)
    state, stats = deciding(cell)(torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64))
    assert state.shape == (0, 1) and stats.steps.shape == stats.ponder_cost.shape == (0,) and len(cell.seen) == 1


def test_rows_that_never_want_to_halt_are_stopped_with_all_of_the_remainder() -> None:
    ponder = deciding(Recorder(countdown), max_steps=4)
    state, stats = ponder(torch.zeros(2, 0, dtype=torch.float64), torch.tensor([[50.0], [2.0]], dtype=torch.float64))
    assert stats.steps.tolist() == [4, 2]
    # sigmoid(20 - 60 k) < 1e-17 for k >= 1: nothing is spent before the end.
    torch.testing.assert_close(stats.remainder, torch.ones(2, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(state[:, 0], torch.tensor([46.0, 0.0], dtype=torch.float64), **EXACT)


def test_halting_starts_at_two_steps_and_is_computed_in_float32() -> None:
    ponder = AdaptiveComputation(lambda x, state, rows: state, WIDTH)
    state, stats = ponder.bfloat16()(torch.zeros(3, 1).bfloat16(), torch.randn(3, WIDTH).bfloat16())
    assert state.dtype == torch.bfloat16 and stats.remainder.dtype == stats.ponder_cost.dtype == torch.float32
    # Graves: sigmoid(1) = 0.731, R = 0.269, exact to float32's rounding of two sums
    torch.testing.assert_close(stats.ponder_cost, torch.full((3,), 2.2689414), rtol=0, atol=3e-7)


def test_autocast_leaves_halting_in_float32() -> None:
    seed_cpu(0)
    unit = HaltingUnit(WIDTH, 1.0)
    nn.init.normal_(unit.weight)
    state = torch.randn(50, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = unit(state)
    assert torch.equal(inside, unit(state))


def assert_autocast_changes_rounding_alone(ponder: nn.Module) -> None:
    """Under bf16 autocast: the state in the cell's bf16, the stats in fp32, and both, with all gradients, those of fp32."""
    generator = torch.Generator().manual_seed(1)
    x, state, upstream = (torch.randn(BATCH, size, generator=generator) for size in (INPUTS, WIDTH, WIDTH))
    leaves = [x.requires_grad_(), state.requires_grad_(), *ponder.parameters()]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out, stats = ponder(x, state)
        assert out.dtype == dtype and stats.remainder.dtype == stats.ponder_cost.dtype == torch.float32
        loss = (upstream * out).sum() + 0.3 * stats.ponder_cost.sum()
        if stats.drafts is not None:
            loss = loss + (stats.drafts.value.sum(1) * stats.drafts.weight).sum()
        results.append((out.float(), stats.steps, stats.ponder_cost, torch.autograd.grad(loss, leaves)))
    # bf16 rounds by up to 2**-9; gradients of up to 15 are sums over 12 rows of a few steps, each of ten roundings
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0.03)
    assert all(grad.any() for grad in results[1][3])


def test_autocast_changes_rounding_alone() -> None:
    seed_cpu(0)
    assert_autocast_changes_rounding_alone(make_ponder(Plain()).float())


@pytest.mark.parametrize("value", [1.0, -0.298828125])
def test_the_mean_field_of_a_constant_state_is_that_state_in_bf16(value: float) -> None:
    """99 weights of 0.01, which bf16 would round to 0.0100098 and add to 1 in steps of 2**-7."""
    ponder = AdaptiveComputation(lambda x, state, rows: state, WIDTH, halting_bias=math.log(0.01 / 0.99)).bfloat16()
    start = torch.full((2, WIDTH), value, dtype=torch.bfloat16)
    state, stats = ponder(torch.zeros(2, 1, dtype=torch.bfloat16), start)
    assert stats.steps.tolist() == [99, 99] and torch.equal(state, start)


@pytest.mark.parametrize(
    ("options", "given"), [({"max_steps": 0}, "max_steps=0"), ({"epsilon": 0.0}, "0.0"), ({"epsilon": 1.0}, "1.0")]
)
def test_impossible_options_are_refused(options: dict[str, float], given: str) -> None:
    with pytest.raises(ValueError, match=given):
        AdaptiveComputation(lambda x, state, rows: state, WIDTH, **options)


# ---- the control -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 3])
def test_fixed_computation_gives_everyone_the_last_of_its_steps(num_steps: int) -> None:
    cell = Recorder(countdown)
    x, start = torch.randn(4, 2), torch.tensor([[9.0], [1.0], [-3.0], [0.0]])
    state, stats = FixedComputation(cell, num_steps)(x, start)
    assert torch.equal(state, start - num_steps)
    assert stats.steps.tolist() == [num_steps] * 4 and stats.steps.dtype == torch.int64
    assert not stats.remainder.any() and stats.ponder_cost.tolist() == [num_steps] * 4
    assert [shown[:, 2].tolist() for shown, _, _ in cell.seen] == [[1.0] * 4] + [[0.0] * 4] * (num_steps - 1)
    assert all(rows.tolist() == [0, 1, 2, 3] for _, _, rows in cell.seen)


# ---- lockstep --------------------------------------------------------------------------------------------------------


@dataclass
class OtherRanks:
    """A collective on whose other ranks rows run for `steps` steps."""

    steps: int
    asked: int = 0

    def max_(self, tensor: Tensor) -> Tensor:
        self.asked += 1
        return tensor.clamp_(min=int(self.asked < self.steps))


class Linked(torch.autograd.Function):
    """Counts the backward passes through a cell, as a collective call in it would."""

    @staticmethod
    def forward(ctx: object, state: Tensor, counts: list[int], anchor: Tensor) -> Tensor:
        ctx.counts = counts
        return state.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        ctx.counts.append(len(grad))
        return grad, None, grad.new_zeros(())


@pytest.mark.parametrize("own", [[1.0, 3.0, 2.0], [1.0, 1.0, 1.0], []])
@pytest.mark.parametrize("others", [1, 2, 6])
def test_in_lockstep_every_rank_runs_and_unwinds_as_many_steps_as_the_slowest(others: int, own: list[float]) -> None:
    calls: list[int] = []
    unwound: list[int] = []
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def cell(x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        calls.append(len(rows))
        assert len(x) == len(state) == len(rows)
        return Linked.apply(state - 1.0, unwound, anchor)

    start = torch.tensor(own, dtype=torch.float64)[:, None]
    x = torch.zeros(len(own), 1, dtype=torch.float64)
    alone, alone_stats = deciding(lambda x, state, rows: state - 1.0)(x, start)
    ponder = deciding(cell)
    ponder.lockstep = OtherRanks(others)
    state, stats = ponder(x, start)
    slowest = max([others, *map(int, own), 1])
    assert calls == [sum(steps >= number for steps in own) for number in range(1, slowest + 1)]
    assert torch.equal(state, alone) and torch.equal(stats.steps, alone_stats.steps)
    assert torch.equal(stats.ponder_cost, alone_stats.ponder_cost)
    (state.sum() + stats.ponder_cost.sum()).backward()
    assert unwound == calls[::-1]


def test_lockstep_ends_at_the_cap_on_every_rank_without_hanging() -> None:
    ponder = deciding(Recorder(countdown), max_steps=3)
    ponder.lockstep = OtherRanks(3)  # the others reach the cap and then have no row running
    _, stats = ponder(torch.zeros(1, 0, dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64))
    assert stats.steps.tolist() == [1] and ponder.lockstep.asked == 3
