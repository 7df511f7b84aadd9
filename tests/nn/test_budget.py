"""The budget of ponder steps: one commit by its formula, and what it makes of a model that answers to the penalty."""

import json
import math

import pytest

from distcond.nn import StepBudget
from distcond.nn.budget import GAIN, HIGHEST, INTEGRAL_GAIN, LOWEST, MARGIN, START

LR = 1e-3


def drive(budget: StepBudget, free_steps: float, loss: float, num_updates: int, start: float = 2.0) -> list[float]:
    """Mean steps of a model that drifts towards `free_steps`, at most lr of it an update, and is pushed down by the penalty.

    As under Adam the move depends on the balance of both pulls alone, not on their size; a share of 0.01 of the loss a step
    is as strong as the drift.
    """
    steps, seen = start, []
    for _ in range(num_updates):
        pull, push = max(0.0, free_steps - steps) / free_steps, budget.penalty / loss / 0.01
        steps = max(1.0, steps * (1 + LR * (pull - push) / math.hypot(pull, push, 1e-9)))
        budget.commit(steps, loss, LR)
        seen.append(steps)
    return seen


def test_a_commit_is_its_formula() -> None:
    budget = StepBudget(4.0)
    assert budget.penalty == 0.0
    budget.commit(5.0, 2.0, LR)
    integral = START + INTEGRAL_GAIN * LR * (0.25 - MARGIN)
    assert budget.penalty == pytest.approx(2.0 * math.exp(integral + GAIN * (0.25 - MARGIN)))
    budget.commit(4.0, 1.0, LR)
    integral -= INTEGRAL_GAIN * LR * MARGIN
    assert budget.penalty == pytest.approx((0.99 * 2.0 + 0.01 * 1.0) * math.exp(integral - GAIN * MARGIN))


@pytest.mark.parametrize("target", [2.0, 3.0, 5.0])
def test_steps_settle_at_the_target_where_free_training_would_ponder_more(target: float) -> None:
    seen = drive(StepBudget(target), 20.0, 0.7, 8000)
    settled = seen[4000:]
    assert sum(settled) / len(settled) == pytest.approx(target, rel=0.02)
    assert max(settled) < 1.05 * target


def test_the_penalty_fades_where_free_training_ponders_less() -> None:
    budget = StepBudget(5.0)
    seen = drive(budget, 3.0, 0.7, 8000)
    assert seen[-1] == pytest.approx(3.0, rel=0.01) and 0 <= budget.penalty < 1e-4 * 0.7


@pytest.mark.parametrize("free", [2.0, 200.0])
def test_a_long_wait_at_a_bound_does_not_wind_it_up(free: float) -> None:
    """From below (nothing to restrain) and from above (the target was out of reach), it settles as fast as ever."""
    budget = StepBudget(4.0)
    for _ in range(100_000):
        budget.commit(free, 0.7, LR)
    settled = drive(budget, 20.0, 0.7, 8000, start=free if free < 4 else 8.0)[5000:]
    assert sum(settled) / len(settled) == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_loss_in_another_unit_is_penalised_in_that_unit(scale: float) -> None:
    one, other = StepBudget(3.0), StepBudget(3.0)
    for steps in (2.0, 9.0, 4.0, 1.0, 3.0):
        one.commit(steps, 0.7, LR)
        other.commit(steps, 0.7 * scale, LR)
        assert other.penalty == pytest.approx(scale * one.penalty)


@pytest.mark.parametrize(("steps", "lowest", "highest"), [(1.0, 0.0, math.exp(LOWEST)), (100.0, 9.99, math.exp(HIGHEST))])
def test_the_penalty_is_bounded_and_never_negative(steps: float, lowest: float, highest: float) -> None:
    budget = StepBudget(5.0)
    for _ in range(2000):
        budget.commit(steps, 1.0, LR)
    assert lowest <= budget.penalty <= highest * (1 + 1e-12)  # the exponential of a logarithm


@pytest.mark.parametrize("updates", [0, 5])
def test_its_state_goes_through_json_to_the_last_bit(updates: int) -> None:
    straight, before = StepBudget(3.0), StepBudget(3.0)
    for number in range(updates):
        straight.commit(2.0 + number, 1.0 / (number + 3), LR)
        before.commit(2.0 + number, 1.0 / (number + 3), LR)
    after = StepBudget(3.0)
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    for budget in (straight, after):
        budget.commit(3.7, 0.3, LR)
    assert after.state_dict() == straight.state_dict() and after.penalty == straight.penalty > 0


@pytest.mark.parametrize("target", [0.9, 0.0, math.nan])
def test_a_target_below_one_step_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target_steps="):
        StepBudget(target)


def test_the_penalty_is_a_share_of_a_loss_below_0_and_forgets_infinite_ones() -> None:
    positive, negative, broken = StepBudget(3.0), StepBudget(3.0), StepBudget(3.0)
    broken.commit(math.nan, math.inf, LR)
    assert broken.penalty == 0.0
    for steps in (5.0, 4.0, 2.0):
        positive.commit(steps, 1.5, LR)
        negative.commit(steps, -1.5, LR)
        broken.commit(steps, math.nan, LR)
        broken.commit(steps, 1.5, LR)
        broken.commit(steps, math.inf, LR)
    assert positive.penalty > 0
    assert positive.state_dict() == negative.state_dict() == broken.state_dict()
