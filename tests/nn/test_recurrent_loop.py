"""The loop of a recurrent network as one autograd function: it is the loop of modules, and autograd's gradient."""

import pytest
import torch
from torch import Tensor

from distcond.nn import AdaptiveComputation, recurrent, recurrent_loop
from distcond.nn.linear import TreeOptions
from distcond.nn.recurrent import Recurrent
from tests.nn.test_recurrent import LENGTH, build, make_inputs
from tests.trees import seed_cpu

NEAR = {"rtol": 1e-10, "atol": 1e-11}  # float64; 5 time steps of at most 6 ponder steps on states of size 1
LENGTHS = [torch.tensor([5, 1, 3, 0, 4, 5]), torch.full((6,), LENGTH), torch.zeros(6, dtype=torch.int64)]


def results(model: Recurrent, inputs: Tensor, lengths: Tensor) -> list[Tensor]:
    """Logits, stats, and the gradients of a loss that weighs all of them."""
    inputs = inputs.detach().requires_grad_(inputs.is_floating_point())
    model.zero_grad()
    logits, stats = model(inputs, lengths)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cost = stats.ponder_cost * torch.arange(1, len(stats.ponder_cost) + 1)
    ((logits * weight).sum() + 0.1 * cost.sum() + (stats.remainder**2).sum()).backward()
    found = [logits, stats.steps, stats.remainder, stats.ponder_cost]
    found += [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return [*found, inputs.grad] if inputs.grad is not None else found


@pytest.mark.parametrize("lengths", LENGTHS, ids=["ragged", "full", "empty"])
@pytest.mark.parametrize("kind", ["act", "fixed"])
@pytest.mark.parametrize("cell", ["tanh", "lstm", "gru"])
def test_the_loop_is_the_modules(cell: str, kind: str, lengths: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(cell, kind), make_inputs()
    assert recurrent._is_plain(model.ponder)
    fast = results(model, inputs, lengths)
    monkeypatch.setattr(recurrent, "_is_plain", lambda _: False)
    slow = results(model, inputs, lengths)
    if kind == "act" and lengths[0]:
        assert len(set(slow[1].tolist())) > 2  # rows halt at different steps
    for got, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, wanted.expand_as(got), **NEAR)


def test_bytes_are_one_hot_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_cpu(0)
    cell = build("lstm", "act").ponder.cell
    cell = type(cell)(256 + 1, 6, TreeOptions()).double()
    model = Recurrent(AdaptiveComputation(cell, 6, 4, halting_bias=-1.0), 6, 2, 3).double()
    inputs = torch.randint(256, (6, LENGTH), dtype=torch.uint8)
    fast = results(model, inputs, LENGTHS[0])
    monkeypatch.setattr(recurrent, "_is_plain", lambda _: False)
    for got, wanted in zip(fast, results(model, inputs, LENGTHS[0]), strict=True):
        torch.testing.assert_close(got, wanted, **NEAR)


def test_gradients_of_many_rows_are_multiplied_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("lstm", "act"), make_inputs()
    whole = results(model, inputs, LENGTHS[0])
    monkeypatch.setattr("distcond.nn.recurrent_loop.ROWS_AT_ONCE", 7)
    for got, wanted in zip(results(model, inputs, LENGTHS[0]), whole, strict=True):
        torch.testing.assert_close(got, wanted, **NEAR)


def test_what_modules_must_compute_is_left_to_them() -> None:

    assert not recurrent._is_plain(build("tanh", "act", TreeOptions(depth=2)).ponder)
    assert not recurrent._is_plain(build("tanh", "act").bfloat16().ponder)
    waiting = build("tanh", "act").ponder
    waiting.lockstep = object()
    assert not recurrent._is_plain(waiting)
    hooked = build("tanh", "fixed").ponder
    hooked.cell.linear.register_forward_pre_hook(lambda *_: None)
    assert not recurrent._is_plain(hooked)
    with torch.autocast("cpu", torch.bfloat16):
        assert not recurrent._is_plain(build("tanh", "act").float().ponder)


@pytest.mark.parametrize("kind", ["act", "fixed"])
def test_steps_are_kept_only_where_a_backward_pass_may_follow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr(recurrent_loop, "_Step", lambda *step: kept.append(step))
    model, inputs = build("lstm", kind), make_inputs()
    with torch.no_grad():
        without, _ = model(inputs, LENGTHS[0])
    assert not kept
    logits, _ = model(inputs, LENGTHS[0])
    assert kept and torch.equal(logits, without)
