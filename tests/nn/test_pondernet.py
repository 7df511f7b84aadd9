"""PonderNet against a loop over single rows that knows nothing of batches, and against its paper's formulas."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from distcond.nn import PonderNet
from tests.nn.test_halting import (
    BATCH,
    EXACT,
    INPUTS,
    WIDTH,
    OneTensor,
    OtherRanks,
    Plain,
    TwoTensors,
    assert_autocast_changes_rounding_alone,
)
from tests.trees import seed_cpu


def make_ponder(cell: nn.Module, max_steps: int = 9, epsilon: float = 0.05) -> PonderNet:
    ponder = PonderNet(cell, WIDTH, max_steps, epsilon, halting_bias=-0.7).double()
    with torch.no_grad():
        ponder.halting.weight.copy_(torch.linspace(-3, 3, WIDTH))
    return ponder


def make_input(cell: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
    x = torch.randn(BATCH, INPUTS, dtype=torch.float64)
    state = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    memory = torch.randn(BATCH, 2, WIDTH, dtype=torch.float64)
    return x, (state, memory) if isinstance(cell, TwoTensors) else (state,)


def alone(ponder: PonderNet, x: Tensor, state: tuple[Tensor, ...], row: int) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """Of one row: p_n and the states of its steps in training."""
    part = tuple(tensor[row : row + 1] for tensor in state)
    weights: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    left = torch.ones((), dtype=torch.float64)
    for number in range(1, ponder.max_steps + 1):
        flag = torch.full((1, 1), float(number == 1), dtype=x.dtype)
        out = ponder.cell(torch.cat([x[row : row + 1], flag], 1), part if len(part) > 1 else part[0], torch.tensor([row]))
        part = out if isinstance(out, tuple) else (out,)
        states.append(part)
        rate = torch.sigmoid(part[0][0] / WIDTH**0.5 @ ponder.halting.weight[0] + ponder.halting.bias[0])
        if left * (1 - rate) <= ponder.epsilon or number == ponder.max_steps:
            return [*weights, left], states
        weights.append(left * rate)
        left = left * (1 - rate)
    raise AssertionError("the last step returns")


@pytest.mark.parametrize("max_steps", [1, 3, 9])
@pytest.mark.parametrize("make_cell", [OneTensor, TwoTensors])
def test_training_equals_each_row_pondered_alone(make_cell: type[nn.Module], max_steps: int) -> None:
    seed_cpu(0)
    ponder = make_ponder(make_cell(), max_steps)
    x, state = make_input(ponder.cell)
    leaves = [x.requires_grad_(), *(part.requires_grad_() for part in state), *ponder.parameters()]
    out, stats = ponder(x, state if len(state) > 1 else state[0])
    out = out if isinstance(out, tuple) else (out,)
    assert stats.drafts is not None
    drafts = stats.drafts
    mine = (drafts.value.sum(1) * drafts.weight).sum() + 0.3 * stats.ponder_cost.sum() + torch.special.entr(drafts.weight).sum()
    theirs = torch.zeros((), dtype=torch.float64)
    for row in range(BATCH):
        weights, states = alone(ponder, x, state, row)
        spent = torch.stack(weights).cumsum(0)
        median = next(n for n in range(len(weights)) if spent[n] >= 0.5)
        for tensor, parts in zip(out, zip(*states, strict=True), strict=True):
            torch.testing.assert_close(tensor[row], parts[median][0], **EXACT)
        assert int(stats.steps[row]) == len(weights)
        torch.testing.assert_close(stats.remainder[row], weights[-1], **EXACT)
        cost = sum(number * weight for number, weight in enumerate(weights, start=1))
        torch.testing.assert_close(stats.ponder_cost[row], cost, **EXACT)
        torch.testing.assert_close(drafts.weight[drafts.rows == row], torch.stack(weights), **EXACT)
        for weight, parts in zip(weights, states, strict=True):
            theirs = theirs + weight * parts[0].sum() + torch.special.entr(weight)
        theirs = theirs + 0.3 * cost
    grads = [torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in (mine, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)  # sums of 12 rows x 9 steps of gradients up to 10
    assert max_steps < 9 or len(stats.steps.unique()) > 2  # the rows halted apart


def test_the_state_that_is_handed_on_has_the_gradient_of_the_mean() -> None:
    seed_cpu(0)
    ponder = make_ponder(OneTensor())
    x, (state,) = make_input(ponder.cell)
    out, stats = ponder(x, state)
    drafts = stats.drafts
    assert drafts is not None
    mean = torch.zeros_like(out).index_add(0, drafts.rows, drafts.value * drafts.weight[:, None])
    assert (out - mean).abs().max() > 0.01  # another value
    upstream = torch.randn_like(mean)
    grads = [torch.autograd.grad((upstream * value).sum(), [*ponder.parameters()], retain_graph=True) for value in (out, mean)]
    torch.testing.assert_close(grads[0], grads[1], **EXACT)
    assert all(grad.any() for grad in grads[0])


@pytest.mark.parametrize("make_cell", [OneTensor, TwoTensors])
def test_evaluation_stops_at_the_median_step_with_the_state_of_training(make_cell: type[nn.Module]) -> None:
    seed_cpu(0)
    ponder = make_ponder(make_cell())
    x, parts = make_input(ponder.cell)
    state = parts if len(parts) > 1 else parts[0]
    trained, spent = ponder(x, state)
    evaluated, stats = ponder.eval()(x, state)
    torch.testing.assert_close(evaluated, trained, **EXACT)
    assert stats.drafts is None and (stats.steps <= spent.steps).all() and (stats.steps < spent.steps).any()
    for row in range(BATCH):
        weights, _ = alone(ponder, x, parts, row)
        spent = torch.stack(weights).detach().cumsum(0).tolist()
        assert int(stats.steps[row]) == 1 + sum(share < 0.5 for share in spent)


def test_the_regulariser_is_the_divergence_from_the_prior_up_to_a_constant() -> None:
    """KL(p || Geom(lambda_p)), summed up term by term, against the entropy and the mean that the loss is made of."""
    seed_cpu(0)
    ponder = make_ponder(OneTensor())
    _, stats = ponder(*[part if torch.is_tensor(part) else part[0] for part in make_input(ponder.cell)])
    rate = 0.2
    gaps = []
    for row in range(BATCH):
        assert stats.drafts is not None
        p = stats.drafts.weight[stats.drafts.rows == row]
        prior = rate * (1 - rate) ** torch.arange(len(p), dtype=torch.float64)
        divergence = (p * (p / prior).log()).sum()
        ours = -math.log(1 - rate) * stats.ponder_cost[row] - torch.special.entr(p).sum()
        gaps.append((divergence - ours).item())
    assert all(first == pytest.approx(second, abs=1e-12) for first, second in pairwise(gaps))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("own", [0, 3])
@pytest.mark.parametrize("others", [1, 4, 20])
def test_in_lockstep_every_rank_runs_as_many_steps_as_the_slowest(others: int, own: int, training: bool) -> None:
    seed_cpu(0)
    ponder = make_ponder(OneTensor()).train(training)
    x, (state,) = make_input(ponder.cell)
    expected, stats = ponder(x[:own], state[:own])
    calls: list[int] = []
    ponder.cell.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    ponder.lockstep = OtherRanks(min(others, ponder.max_steps))
    out, same = ponder(x[:own], state[:own])
    assert torch.equal(out, expected) and torch.equal(same.steps, stats.steps)
    slowest = max([min(others, ponder.max_steps), *stats.steps.tolist(), 1])
    assert calls == [int((stats.steps >= number).sum()) for number in range(1, slowest + 1)]
    if training:  # empty steps too are part of what backward unwinds
        ponder.zero_grad()
        (out.sum() + same.ponder_cost.sum()).backward()
        assert all(parameter.grad is not None for parameter in ponder.parameters())


def test_autocast_changes_rounding_alone() -> None:
    seed_cpu(0)
    assert_autocast_changes_rounding_alone(make_ponder(Plain()).float())


@pytest.mark.parametrize(("options", "given"), [({"max_steps": 0}, "max_steps=0"), ({"epsilon": 1.0}, "epsilon=1.0")])
def test_impossible_options_are_refused(options: dict[str, float], given: str) -> None:
    with pytest.raises(ValueError, match=given):
        PonderNet(lambda x, state, rows: state, WIDTH, **options)
