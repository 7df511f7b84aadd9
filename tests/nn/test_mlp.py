"""Feed-forward models: a prediction sees its window and nothing else; the block is its formula."""

import pytest
import torch
from torch import Tensor, nn

from distcond.nn import AdaptiveComputation, FixedComputation
from distcond.nn.linear import TreeOptions
from distcond.nn.mlp import ResidualCell, VectorMLP, WindowMLP
from tests.trees import seed_cpu

EXACT = {"rtol": 0, "atol": 1e-12}  # float64; at most 5 ponder steps on states of size 1
WIDTH, WINDOW, LENGTH, INPUTS, OUTPUTS = 6, 3, 7, 4, 2
TREES = [TreeOptions(), TreeOptions(depth=3, full_depth=1, rank=2, storage="lazy")]


def ponder_of(kind: str, tree: TreeOptions) -> nn.Module:
    cell = ResidualCell(WIDTH, tree)
    if kind == "fixed":
        return FixedComputation(cell, 2)
    ponder = AdaptiveComputation(cell, WIDTH, 5, halting_bias=-1.0)
    nn.init.normal_(ponder.halting.weight, std=3.0)
    return ponder


def bytes_model(kind: str = "act", tree: TreeOptions = TREES[0]) -> WindowMLP:
    seed_cpu(0)
    return WindowMLP(ponder_of(kind, tree), WIDTH, WINDOW).double().eval()


def vector_model(kind: str = "act", tree: TreeOptions = TREES[0]) -> VectorMLP:
    seed_cpu(0)
    return VectorMLP(ponder_of(kind, tree), INPUTS, WIDTH, OUTPUTS).double().eval()


def some_bytes(rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(256, (rows, LENGTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def some_vectors(rows: int = 4) -> Tensor:
    return torch.randn(rows, LENGTH, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_cell_is_its_formula() -> None:
    cell = bytes_model().ponder.cell
    nn.init.normal_(cell.norm.weight)
    state = torch.randn(4, WIDTH, dtype=torch.float64)
    for flag in (0.0, 1.0):
        entered = state + flag * cell.first_step.weight[:, 0]
        scale = entered.square().mean(1, keepdim=True).add(torch.finfo(torch.float64).eps).rsqrt()
        hidden = nn.functional.gelu(entered * scale * cell.norm.weight, approximate="tanh")
        expected = entered + hidden @ cell.linear.weight.T + cell.linear.bias
        torch.testing.assert_close(cell(torch.full((4, 1), flag).double(), state, torch.arange(4)), expected, **EXACT)


@pytest.mark.parametrize("kind", ["fixed", "act"])
@pytest.mark.parametrize("tree", TREES)
def test_a_byte_changes_the_predictions_whose_window_holds_it_and_no_other(tree: TreeOptions, kind: str) -> None:
    model, text = bytes_model(kind, tree), some_bytes(1)
    lengths = torch.tensor([LENGTH])
    before, stats = model(text, lengths)
    assert before.shape == (1, LENGTH, 256) and stats.steps.shape == (LENGTH,)
    for place in range(LENGTH):
        other = text.clone()
        other[0, place] += 1
        # Neighbours' sums may be added in another order; what is seen changes logits by 1e-3 and more.
        changed = ((model(other, lengths)[0] - before).abs() > EXACT["atol"]).any(2)[0]
        assert changed.nonzero()[:, 0].tolist() == list(range(place, min(LENGTH, place + WINDOW)))


def test_before_the_start_of_a_sequence_stand_zeros() -> None:
    model, text = bytes_model(), some_bytes(1)
    logits, _ = model(text, torch.tensor([LENGTH]))
    embedded = model.embedding(text[0].long())
    for place in range(LENGTH):
        window = torch.zeros(WINDOW, embedded.shape[1], dtype=torch.float64)
        seen = embedded[max(0, place - WINDOW + 1) : place + 1]
        window[WINDOW - len(seen) :] = seen
        inputs = model.input.weight.view(WIDTH, embedded.shape[1], WINDOW)
        state = torch.einsum("dew,we->d", inputs, window) + model.input.bias
        mean, _ = model.ponder(state.new_empty(1, 0), state[None])
        torch.testing.assert_close(logits[0, place], model.head(mean)[0], **EXACT)


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model, text = bytes_model(), some_bytes()
    together, stats = model(text, torch.tensor([LENGTH] * 2))
    apart = [model(row[None], torch.tensor([LENGTH])) for row in text]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in apart]), **EXACT)
    assert torch.equal(stats.steps, torch.cat([own.steps for _, own in apart]))
    assert len(stats.steps.unique()) > 1  # otherwise halting told nothing


@pytest.mark.parametrize("kind", ["fixed", "act"])
@pytest.mark.parametrize("tree", TREES)
def test_a_vector_is_answered_alone_at_the_same_cost(tree: TreeOptions, kind: str) -> None:
    model, x, lengths = vector_model(kind, tree), some_vectors(), torch.tensor([LENGTH, 0, 3, 1])
    logits, stats = model(x, lengths)
    assert logits.shape == (4, LENGTH, OUTPUTS) and stats.steps.dtype == torch.int64
    for row, length in enumerate(lengths.tolist()):
        for time in range(length):
            alone, own = model(x[row : row + 1, time : time + 1], torch.tensor([1]))
            torch.testing.assert_close(logits[row, time], alone[0, 0], **EXACT)
            for name in ("steps", "remainder", "ponder_cost"):
                expected = getattr(own, name)[0].item()
                assert getattr(stats, name)[row * LENGTH + time].item() == pytest.approx(expected, abs=1e-6)  # float32
        assert not logits[row, length:].any()
        assert not stats.steps[row * LENGTH + length : (row + 1) * LENGTH].any()


@pytest.mark.parametrize("tree", TREES)
def test_every_parameter_learns(tree: TreeOptions) -> None:
    for model, x in ((bytes_model("act", tree), some_bytes(4)), (vector_model("act", tree), some_vectors())):
        model.train()
        logits, stats = model(x, torch.tensor([LENGTH] * 4))
        (logits.square().sum() + stats.ponder_cost.sum()).backward()
        silent = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
        assert silent == ([] if tree.depth == 0 else ["ponder.cell.linear.gate.weight"])  # nodes of zeros teach no gate yet
