"""A checkpoint that is forced to a number of steps gives what it gave where that was everybody's number anyway."""

import pytest
import torch
from torch import Tensor, nn

from distcond.evaluate.forced import ForcedComputation, forced, numbers_to_try
from distcond.nn import AdaptiveComputation
from distcond.nn.halting import Pondering
from distcond.nn.pondernet import PonderNet


class _Cell(nn.Module):
    """A state that differs from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 + 4, 4)

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        return torch.tanh(self.linear(torch.cat([x, state], dim=1)))


def _made(kind: type[Pondering], bias: float, spread: float) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    ponder = kind(_Cell(), 4, 9, 0.01, bias).eval()
    nn.init.normal_(ponder.halting.weight, std=spread)
    return nn.ModuleDict({"ponder": ponder}), torch.randn(32, 2), torch.randn(32, 4)


@pytest.mark.parametrize("kind", [AdaptiveComputation, PonderNet])
@pytest.mark.parametrize("bias", [6.0, 1.0, -1.0])
def test_forced_to_everybodys_number_it_is_the_model_itself(kind: type[Pondering], bias: float) -> None:
    body, x, state = _made(kind, bias, spread=0.0)
    with torch.no_grad():
        own, stats = body["ponder"](x, state)
        (number,) = stats.steps.unique().tolist()
        with forced(body, number):
            result, spent = body["ponder"](x, state)
    assert torch.equal(result, own) and torch.equal(spent.steps, stats.steps)


def test_rows_that_would_have_halted_before_keep_what_they_had_and_others_are_cut_off() -> None:
    body, x, state = _made(AdaptiveComputation, -0.5, spread=4.0)
    ponder = body["ponder"]
    with torch.no_grad():
        own, stats = ponder(x, state)
        most, least = int(stats.steps.max()), int(stats.steps.min())
        assert most > least + 1
        for number in range(least, most + 1):
            result, spent = ForcedComputation(ponder, number)(x, state)
            assert spent.steps.tolist() == [number] * 32
            done = stats.steps <= number
            assert torch.allclose(result[done], own[done], atol=1e-6)  # fp32: zeros are added to a sum
            assert not torch.isclose(result[~done], own[~done], atol=1e-4).all(1).any()
            ponder.max_steps = number
            capped, _ = ponder(x, state)
            ponder.max_steps = 9
            assert torch.allclose(result, capped, atol=1e-6)


def test_the_model_is_itself_again_afterwards() -> None:
    body, x, state = _made(AdaptiveComputation, 1.0, spread=1.0)
    before, names = body["ponder"], list(body.state_dict())
    with pytest.raises(ValueError, match="need a row for each"), forced(body, 2):
        assert isinstance(body["ponder"], ForcedComputation)
        body["ponder"](x[:3], state)
    assert body["ponder"] is before and list(body.state_dict()) == names


@pytest.mark.parametrize(
    ("mean", "most", "numbers"),
    [(1.0, 1, [1]), (1.6, 2, [1, 2]), (2.28, 5, [1, 2, 3, 5]), (20.5, 40, [1, 2, 3, 4, 5, 6, 7, 8, 16, 20, 21, 40])],
)
def test_numbers_on_either_side_of_the_mean_are_tried(mean: float, most: int, numbers: list[int]) -> None:
    assert numbers_to_try(mean, most) == numbers
