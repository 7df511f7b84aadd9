"""The recurrent network: its cells by their formulas, ragged lengths, ponder costs summed over time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcond.nn import AdaptiveComputation, FixedComputation
from distcond.nn.cells import CELLS
from distcond.nn.linear import TreeOptions
from distcond.nn.recurrent import Recurrent
from distcond.nn.transformer import VOCABULARY
from tests.pairs import every_pair
from tests.trees import seed_cpu

EXACT = {"rtol": 0, "atol": 1e-12}  # float64; 5 time steps of at most 6 ponder steps on states of size 1
INPUTS, WIDTH, OUTPUTS, LENGTH = 3, 6, 2, 5
TREES = [TreeOptions(), TreeOptions(depth=2), TreeOptions(depth=3, full_depth=1, rank=2, storage="lazy")]


def build(cell_name: str, kind: str, tree: TreeOptions = TreeOptions(), max_steps: int = 6) -> Recurrent:  # noqa: B008 (frozen)
    seed_cpu(0)
    cell = CELLS[cell_name](INPUTS + 1, WIDTH, tree)
    ponder: nn.Module = FixedComputation(cell, max_steps)
    if kind == "act":
        ponder = AdaptiveComputation(cell, WIDTH, max_steps, halting_bias=-1.0)
        nn.init.normal_(ponder.halting.weight, std=3.0)
    return Recurrent(ponder, WIDTH, 2 if cell_name == "lstm" else 1, OUTPUTS).double()


def make_inputs(batch: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(batch, LENGTH, INPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_tanh_cell_is_its_formula() -> None:
    cell = build("tanh", "fixed").ponder.cell
    x, state = torch.randn(4, INPUTS + 1).double(), torch.randn(4, WIDTH).double()
    weight, bias = cell.linear.weight, cell.linear.bias
    expected = torch.tanh(x @ weight[:, : INPUTS + 1].T + state @ weight[:, INPUTS + 1 :].T + bias)
    torch.testing.assert_close(cell(x, state, torch.arange(4)), expected, **EXACT)


def test_the_lstm_cell_is_torchs() -> None:
    """torch orders its gates input, forget, cell, output; ours are input, forget, output, cell."""
    cell = build("lstm", "fixed").ponder.cell
    other = nn.LSTMCell(INPUTS + 1, WIDTH).double()
    i, f, o, c = cell.linear.weight.chunk(4)
    ordered, (bi, bf, bo, bc) = torch.cat([i, f, c, o]), cell.linear.bias.chunk(4)
    with torch.no_grad():
        other.weight_ih.copy_(ordered[:, : INPUTS + 1])
        other.weight_hh.copy_(ordered[:, INPUTS + 1 :])
        other.bias_ih.copy_(torch.cat([bi, bf, bc, bo]))
        other.bias_hh.zero_()
    x, state = torch.randn(4, INPUTS + 1).double(), (torch.randn(4, WIDTH).double(), torch.randn(4, WIDTH).double())
    torch.testing.assert_close(cell(x, state, torch.arange(4)), other(x, state), **EXACT)


def test_the_gru_cell_is_torchs_where_its_candidate_reads_input_and_state_apart() -> None:
    cell = build("gru", "fixed").ponder.cell
    other = nn.GRUCell(INPUTS + 1, WIDTH).double()
    with torch.no_grad():
        of_input, of_state = cell.linear.weight.chunk(4)[2:]
        of_input[:, INPUTS + 1 :].zero_()
        of_state[:, : INPUTS + 1].zero_()
        reset, keep, _, _ = cell.linear.weight.chunk(4)
        bias_r, bias_z, bias_a, bias_b = cell.linear.bias.chunk(4)
        other.weight_ih.copy_(torch.cat([reset, keep, of_input])[:, : INPUTS + 1])
        other.weight_hh.copy_(torch.cat([reset, keep, of_state])[:, INPUTS + 1 :])
        other.bias_ih.copy_(torch.cat([bias_r, bias_z, bias_a]))
        other.bias_hh.copy_(torch.cat([torch.zeros_like(bias_r), torch.zeros_like(bias_z), bias_b]))
    x, state = torch.randn(4, INPUTS + 1).double(), torch.randn(4, WIDTH).double()
    torch.testing.assert_close(cell(x, state, torch.arange(4)), other(x, state), **EXACT)


@pytest.mark.parametrize(("cell", "kind", "tree"), every_pair(list(CELLS), ["act", "fixed"], TREES))
def test_a_sequence_among_others_is_what_it_is_alone_at_the_same_cost(cell: str, kind: str, tree: TreeOptions) -> None:
    model, inputs = build(cell, kind, tree), make_inputs()
    lengths = torch.tensor([5, 1, 3, 0, 4, 5])
    logits, stats = model(inputs, lengths)
    assert logits.shape == (6, LENGTH, OUTPUTS)
    for row, length in enumerate(lengths.tolist()):
        state: Any = tuple(torch.zeros(1, WIDTH, dtype=torch.float64) for _ in range(model.num_states))
        for time in range(length):
            mean, spent = model.ponder(inputs[row : row + 1, time], state if model.num_states > 1 else state[0])
            state = mean if isinstance(mean, tuple) else (mean,)
            torch.testing.assert_close(logits[row, time], model.head(state[0])[0], **EXACT)
            place = row * LENGTH + time
            assert int(stats.steps[place]) == int(spent.steps)
            assert stats.remainder[place].item() == pytest.approx(spent.remainder.item(), abs=1e-12)
            assert stats.ponder_cost[place].item() == pytest.approx(spent.ponder_cost.item(), abs=1e-12)
        assert not stats.steps[row * LENGTH + length : (row + 1) * LENGTH].any()
    torch.testing.assert_close(stats.ponder_cost, stats.steps + stats.remainder, **EXACT)


@pytest.mark.parametrize("cell", list(CELLS))
def test_gradient_flows_through_time_and_through_the_cost_of_every_time_step(cell: str) -> None:
    model = build(cell, "act")
    inputs = make_inputs().requires_grad_()
    logits, stats = model(inputs, torch.tensor([5, 1, 3, 0, 4, 5]))
    (through_state,) = torch.autograd.grad(logits[0, -1].sum(), inputs, retain_graph=True)
    assert (through_state[0].abs().sum(1) > 0).all() and not through_state[1:].any()
    (through_cost,) = torch.autograd.grad(stats.ponder_cost.sum(), inputs)
    assert through_cost[0].any() and not through_cost[3].any() and not through_cost[1, 1:].any()


@pytest.mark.parametrize("kind", ["act", "fixed"])
def test_every_time_step_is_taken_however_short_the_sequences(kind: str) -> None:
    """Ranks with shorter sequences must call the collectives in the cell as often as the others."""
    model = build("tanh", kind, max_steps=2)
    rows: list[int] = []
    model.ponder.cell.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    model(make_inputs(), torch.tensor([1, 2, 0, 1, 1, 0]))
    assert len(rows) >= LENGTH and rows[-(LENGTH - 2) :] == [0] * (LENGTH - 2) and rows[0] == 4


@pytest.mark.parametrize("kind", ["act", "fixed"])
@pytest.mark.parametrize("cell", list(CELLS))
def test_it_runs_and_learns_in_bfloat16(cell: str, kind: str) -> None:
    model = build(cell, kind, TREES[2]).bfloat16()
    logits, stats = model(make_inputs().bfloat16(), torch.tensor([5, 1, 3, 0, 4, 5]))
    assert logits.dtype == torch.bfloat16 and stats.ponder_cost.dtype == torch.float32
    (logits.float().square().mean() + stats.ponder_cost.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["act", "fixed"])
def test_bytes_are_one_hot_vectors(kind: str) -> None:
    seed_cpu(0)
    cell = CELLS["gru"](VOCABULARY + 1, WIDTH, TreeOptions())
    ponder = AdaptiveComputation(cell, WIDTH) if kind == "act" else FixedComputation(cell, 2)
    model = Recurrent(ponder, WIDTH, 1, VOCABULARY).double()
    text, lengths = torch.randint(256, (3, LENGTH), dtype=torch.uint8), torch.tensor([5, 0, 3])
    logits, stats = model(text, lengths)
    vectors = torch.eye(256, dtype=torch.float64)[text.long()]
    other, other_stats = model(vectors, lengths)
    assert torch.equal(logits, other) and torch.equal(stats.ponder_cost, other_stats.ponder_cost)
