"""The compiled loop of a recurrent network against the loop of modules in float64, over widths that end inside a vector."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distcond.nn import AdaptiveComputation, FixedComputation, recurrent
from distcond.nn.cells import CELLS
from distcond.nn.linear import TreeOptions
from distcond.nn.recurrent import Recurrent
from distcond.ops import native_recurrent, use_kernels
from tests.trees import seed_cpu

NEAR = {"rtol": 2e-5, "atol": 2e-5}  # fp32: sums over at most 130 units, 4 time steps and 6 ponder steps, of numbers of size 1
LENGTHS = torch.tensor([4, 1, 3, 0, 4, 4, 2, 3, 4])
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc here")


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    use_kernels("native")
    yield
    use_kernels("torch")
    torch.set_num_threads(1)


def build(cell: str, kind: str, width: int) -> Recurrent:
    """A model whose rows halt after different numbers of steps."""
    seed_cpu(0)
    kinds = CELLS[cell]
    made = kinds(5 + 1, width, TreeOptions())
    ponder = AdaptiveComputation(made, width, 6, halting_bias=-1.0) if kind == "act" else FixedComputation(made, 3)
    if isinstance(ponder, AdaptiveComputation):
        torch.nn.init.normal_(ponder.halting.weight, std=3.0)
    return Recurrent(ponder, width, kinds.states, 3)


def inputs() -> Tensor:
    return torch.randn(len(LENGTHS), 4, 5, generator=torch.Generator().manual_seed(1))


def results(model: Recurrent, x: Tensor, lengths: Tensor = LENGTHS) -> list[Tensor]:
    """Logits, stats and all gradients of a loss that weighs all of them."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    logits, stats = model(x, lengths)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(x.device)
    cost = stats.ponder_cost * torch.linspace(0.1, 1, len(stats.ponder_cost), device=x.device)
    ((logits * weight).sum() + cost.sum() + (stats.remainder**2).sum()).backward()
    assert x.grad is not None
    found = [logits.detach(), stats.steps, stats.remainder.detach(), x.grad]
    return [*found, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [7, 130])
@pytest.mark.parametrize("kind", ["act", "fixed"])
@pytest.mark.parametrize("cell", CELLS)
def test_it_is_the_loop_of_modules(cell: str, kind: str, width: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(threads)
    model = build(cell, kind, width)
    fast = results(model, inputs())
    monkeypatch.setattr(recurrent, "_is_plain", lambda _: False)
    slow = results(model.double(), inputs().double())
    if kind == "act":
        assert len(set(slow[1].tolist())) > 3  # rows halt at different steps
    for got, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), **NEAR)


def test_it_is_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(native_recurrent, "forward", lambda *args, **_: calls.append(args[0]))
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(TypeError) if dtype == torch.float32 else torch.no_grad():
            build("gru", "act", 7).to(dtype)(inputs().to(dtype), LENGTHS)
    assert calls == ["gru"]


def test_tapes_are_kept_apart_and_their_memory_used_again() -> None:
    model, x = build("lstm", "act", 130), inputs()
    wanted = [results(model, part) for part in (x, -x)]
    for _ in range(3):
        model.zero_grad()
        losses = [model(part, LENGTHS)[0] for part in (x, -x)]
        for loss in losses:  # the first tape is the older one
            loss.sum().backward()
        for part, before in zip((x, -x), wanted, strict=True):
            assert all(torch.equal(got, want) for got, want in zip(results(model, part), before, strict=True))


def test_inference_keeps_no_tape_and_gives_the_same() -> None:
    model = build("gru", "act", 16)
    with torch.no_grad():
        logits, stats = model(inputs(), LENGTHS)
    trained = results(model, inputs())
    assert torch.equal(logits, trained[0]) and torch.equal(stats.steps, trained[1])


@pytest.mark.parametrize("lengths", [torch.zeros(9, dtype=torch.int64), torch.full((9,), 4)])
def test_none_or_all_of_the_sequences_run(lengths: Tensor) -> None:
    model = build("tanh", "act", 7)
    found = results(model, inputs(), lengths)
    assert (found[1].view(9, 4) > 0).sum(1).tolist() == lengths.tolist()
    assert all(part.isfinite().all() for part in found)


def test_probabilities_that_are_nan_are_refused() -> None:
    model = build("lstm", "act", 7)
    model.ponder.cell.linear.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="halting probabilities are NaN in 8 of 36 rows"):
        model(inputs(), LENGTHS.clamp(max=1))


def test_exponentials_are_those_of_torch() -> None:
    """A cell of one unit whose memory passes all that a product can be, NaN and infinity too."""
    values = torch.tensor([0.0, 1e-20, 1e-3, -0.6, 0.7, -5.0, 20.0, -87.0, 88.0, -1e4, 1e30, torch.inf, -torch.inf, torch.nan])
    given = values[None, :, None].contiguous()
    weight = torch.zeros(1, 2)
    lengths = torch.ones(len(values), dtype=torch.int64)
    out, *_ = native_recurrent.forward("tanh", lengths, given, weight, None, 1, 0.0, records=False)
    torch.testing.assert_close(out.flatten(), torch.tanh(values), rtol=3e-7, atol=1e-30, equal_nan=True)
    four = torch.stack([values, values, values, torch.ones_like(values)], dim=1)[None].contiguous()
    out, *_ = native_recurrent.forward("lstm", lengths, four, torch.zeros(4, 2), None, 1, 0.0, records=False)
    gate = torch.sigmoid(values.double())
    wanted = gate * torch.tanh(gate * torch.tanh(torch.ones(1, dtype=torch.float64)))
    torch.testing.assert_close(out.flatten().double(), wanted, rtol=1e-6, atol=1e-30, equal_nan=True)
