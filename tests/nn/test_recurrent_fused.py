"""The loop of a recurrent network by one kernel a pass: on a GPU as it is, elsewhere through Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from distcond.nn import recurrent
from distcond.nn.cells import CELLS
from distcond.ops import fused_recurrent
from tests.nn import test_recurrent_native
from tests.nn.test_recurrent_native import build, results

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEAR = {"rtol": 2e-5, "atol": 2e-5}  # as of the native loop
LENGTHS = test_recurrent_native.LENGTHS.clamp(max=2)  # a step of a block takes 40 ms where kernels are interpreted


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(fused_recurrent, "serves", lambda *_: True)
    fused_recurrent._room.clear()


def inputs() -> Tensor:
    return test_recurrent_native.inputs()[:, :2]


@pytest.mark.parametrize(("width", "copies"), [(7, 1), (40, 1), (16, 3)], ids=["narrow", "masked", "two programs"])
@pytest.mark.parametrize("kind", ["act", "fixed"])
@pytest.mark.parametrize("cell", CELLS)
def test_it_is_the_loop_of_modules(cell: str, kind: str, width: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(cell, kind, width).to(DEVICE)
    x, lengths = inputs().repeat(copies, 1, 1).to(DEVICE), LENGTHS.repeat(copies).to(DEVICE)
    fast = results(model, x, lengths)
    monkeypatch.setattr(recurrent, "_is_plain", lambda _: False)
    slow = results(model.double(), x.double(), lengths)
    if kind == "act":
        assert len(set(slow[1].tolist())) > 3  # rows halt at different steps
    for got, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), **NEAR)


def test_steps_that_find_no_room_are_taken_again() -> None:
    model, x, lengths = build("tanh", "act", 16).to(DEVICE), inputs().to(DEVICE), LENGTHS.to(DEVICE)
    whole = results(model, x, lengths)
    (kind,) = fused_recurrent._room
    assert fused_recurrent._room[kind] >= int(whole[1].view(9, 2).max(0).values.sum()) > 2
    fused_recurrent._room[kind] = 2
    assert all(torch.equal(got, wanted) for got, wanted in zip(results(model, x, lengths), whole, strict=True))
    assert fused_recurrent._room[kind] > 2


def test_inference_keeps_no_tape_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, lengths = build("gru", "act", 16).to(DEVICE), inputs().to(DEVICE), LENGTHS.to(DEVICE)
    trained = results(model, x, lengths)
    monkeypatch.setattr(fused_recurrent, "_room", {})
    with torch.no_grad():
        logits, stats = model(x, lengths)
    assert torch.equal(logits, trained[0]) and torch.equal(stats.steps, trained[1])
    assert not fused_recurrent._room


def test_tapes_are_kept_apart_and_serve_more_than_once() -> None:
    model, x, lengths = build("lstm", "act", 7).to(DEVICE), inputs()[:, :1].to(DEVICE), LENGTHS.clamp(max=1).to(DEVICE)
    weight = model.ponder.cell.linear.weight
    first, second = (model(part, lengths)[0].sum() for part in (x, -x))
    wanted = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (first, second)]
    found = [torch.autograd.grad(loss, weight)[0] for loss in (first, second)]
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
    assert not torch.equal(*found)


@pytest.mark.parametrize("lengths", [[0] * 9, [2] * 9])
def test_none_or_all_of_the_sequences_run(lengths: list[int]) -> None:
    found = results(build("tanh", "act", 7).to(DEVICE), inputs().to(DEVICE), torch.tensor(lengths, device=DEVICE))
    assert (found[1].view(9, 2) > 0).sum(1).tolist() == lengths
    assert all(part.isfinite().all() for part in found)


def test_probabilities_that_are_nan_are_refused() -> None:
    model = build("lstm", "act", 7).to(DEVICE)
    model.ponder.cell.linear.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="halting probabilities are NaN in 8 of 18 rows"):
        model(inputs().to(DEVICE), LENGTHS.clamp(max=1).to(DEVICE))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # which the interpreter says of infinity
def test_hyperbolic_tangents_are_those_of_torch() -> None:
    values = torch.tensor([0.0, 1e-20, 1e-3, -0.1, 0.149, 0.16, -0.6, -5.0, 20.0, -88.0, 1e30, torch.inf, -torch.inf, torch.nan])
    lengths, weight = torch.ones(len(values), dtype=torch.int64, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    given = values[None, :, None].to(DEVICE)
    out, *_ = fused_recurrent.forward("tanh", lengths, given, weight, None, 1, 0.0, records=False)
    torch.testing.assert_close(out.flatten().cpu(), torch.tanh(values), rtol=1e-6, atol=1e-30, equal_nan=True)


def test_it_serves_single_precision_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(fused_recurrent.fused_rows, "serves", lambda *_: True)
    weight, given = torch.zeros(8, 3), torch.zeros(1, 1, 8)
    assert fused_recurrent.serves(weight, given)
    assert not fused_recurrent.serves(weight.double(), given.double())
    assert not fused_recurrent.serves(weight, given[:, :0])
    assert not fused_recurrent.serves(torch.zeros(8, fused_recurrent.WIDEST + 2), given)
    monkeypatch.undo()
    assert not fused_recurrent.serves(weight, given)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU here")
def test_it_is_what_computes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(fused_recurrent, "forward", lambda *args, **_: calls.append(args[0]))
    with pytest.raises(TypeError):
        build("gru", "act", fused_recurrent.WIDEST).to(DEVICE)(inputs().to(DEVICE), LENGTHS.to(DEVICE))
    assert calls == ["gru"]
