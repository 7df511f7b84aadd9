"""act_weights: Graves' equations 6 to 8, 13, 14 and 18, in float64; shorter precisions; options."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distcond.nn.functional import act_weights

EXACT = {"rtol": 0, "atol": 1e-14}  # float64; sums of at most 20 numbers below 1


def random_h(rows: int = 40, columns: int = 8, scale: float = 1.0) -> Tensor:
    """Halting probabilities of which some halt at once and some never within the columns."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(0.05, 1.0, rows, dtype=torch.float64)[:, None]
    h = sizes * torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    h[-1, 0] = 0.995
    return scale * h


def by_the_book(h: list[float], epsilon: float, max_steps: int) -> tuple[list[float], int, float]:
    """Weights, N and R of one row, equation after equation."""
    total, count = 0.0, 0
    while True:
        count += 1
        total += h[count - 1]
        if total >= 1 - epsilon or count == max_steps:
            break
    remainder = 1 - sum(h[: count - 1])
    return [*h[: count - 1], remainder, *[0.0] * (len(h) - count)], count, remainder


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
@pytest.mark.parametrize("max_steps", [None, 1, 2, 5, 8, 20])
def test_weights_steps_and_remainder_are_those_of_the_equations(max_steps: int | None, epsilon: float) -> None:
    h = random_h()
    weights, steps, remainder = act_weights(h, epsilon, max_steps)
    assert weights.shape == h.shape and steps.dtype == torch.int64
    cap = min(max_steps or 8, 8)
    expected = [by_the_book(row, epsilon, cap) for row in h.tolist()]
    torch.testing.assert_close(weights, torch.tensor([row[0] for row in expected], dtype=torch.float64), **EXACT)
    assert steps.tolist() == [row[1] for row in expected]
    torch.testing.assert_close(remainder, torch.tensor([row[2] for row in expected], dtype=torch.float64), **EXACT)
    assert steps.max() == cap and (cap == 1 or len(steps.unique()) > 1)  # some rows were stopped by the cap, some were not


@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize("max_steps", [None, 1, 3])
def test_weights_sum_to_one_and_none_is_negative(max_steps: int | None, scale: float) -> None:
    weights, steps, remainder = act_weights(random_h(scale=scale), 0.01, max_steps)
    torch.testing.assert_close(weights.sum(1), torch.ones(40, dtype=torch.float64), **EXACT)
    assert (weights >= 0).all() and (remainder > 0).all() and (remainder <= 1).all()
    assert torch.equal(weights.gather(1, steps[:, None] - 1)[:, 0], remainder)


def test_a_sum_of_exactly_one_minus_epsilon_halts() -> None:
    h = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25 - 2**-40, 0.25]], dtype=torch.float64)
    assert act_weights(h, 0.25)[1].tolist() == [2, 3]  # a quarter, a half and their sums are exact in binary


def test_the_usual_start_takes_two_steps() -> None:
    """Graves' bias of 1: sigmoid(1) = 0.731, so N = 2, R = 0.269, rho = 2.27."""
    h = torch.sigmoid(torch.ones(3, 10, dtype=torch.float64))
    _, steps, remainder = act_weights(h)
    assert steps.tolist() == [2, 2, 2]
    torch.testing.assert_close(steps + remainder, torch.full((3,), 2.2689414213699952, dtype=torch.float64), **EXACT)


def test_an_empty_batch_stays_empty() -> None:
    weights, steps, remainder = act_weights(torch.zeros(0, 4))
    assert weights.shape == (0, 4) and steps.shape == remainder.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_precisions_are_added_up_in_float32(dtype: torch.dtype) -> None:
    h = torch.full((2, 1000), 0.001, dtype=dtype)
    given = act_weights(h)
    torch.testing.assert_close(given, act_weights(h.float()), rtol=0, atol=0)
    by_hand = math.ceil(0.99 / float(h[0, 0]))  # 991 in bf16; its own sums would reach 0.99 after 987
    assert given[1].tolist() == [by_hand] * 2
    # a thousand roundings of sums below 1 by 2**-25 each
    torch.testing.assert_close(given[0].sum(1), torch.ones(2), rtol=0, atol=1000 * 2**-25)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": -2}, "max_steps=-2"),
        ({"epsilon": 2.0}, "2.0"),
        ({"epsilon": 0.0}, "0.0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], given: str) -> None:
    with pytest.raises(ValueError, match=given):
        act_weights(random_h(), **options)


@pytest.mark.parametrize("max_steps", [None, 3])
def test_gradient_is_the_finite_difference_with_the_steps_held(max_steps: int | None) -> None:
    h = random_h(rows=10).requires_grad_()
    spare = (h.detach().cumsum(1) - 0.99).abs().min()
    assert spare > 1e-4  # gradcheck moves by 1e-6: no N changes

    def function(h: Tensor) -> tuple[Tensor, Tensor]:
        weights, _, remainder = act_weights(h, 0.01, max_steps)
        return weights, remainder

    assert torch.autograd.gradcheck(function, (h,), atol=1e-9, rtol=0)  # linear: rounding alone, 1e-16 / 1e-6


@pytest.mark.parametrize("max_steps", [None, 3])
def test_gradients_are_equations_14_and_18(max_steps: int | None) -> None:
    h = random_h(rows=10, columns=6)
    steps = act_weights(h, 0.01, max_steps)[1].tolist()
    weights = torch.autograd.functional.jacobian(lambda h: act_weights(h, 0.01, max_steps)[0], h)
    cost = torch.autograd.functional.jacobian(lambda h: sum(act_weights(h, 0.01, max_steps)[1:]), h)
    for row, last in enumerate(steps):
        for n in range(1, 7):
            before = 1.0 if n < last else 0.0
            assert cost[row, row, n - 1] == -before  # equation 14
            for place in range(1, 7):  # equation 18
                expected = (1.0 if place == n and place < last else 0.0) - (before if place == last else 0.0)
                assert weights[row, place - 1, row, n - 1] == expected
    assert len(set(steps)) >= min(max_steps or 3, 2)
