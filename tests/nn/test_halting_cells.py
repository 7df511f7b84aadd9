"""Anyone's cell under a halting module: torch's own cells, a sharded tree, and cells that are not right."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcond.nn import AdaptiveComputation, FixedComputation, PonderNet
from tests.nn.test_halting import row_by_row
from tests.thread_ranks import Groups
from tests.trees import random_tree, seed_cpu

INPUTS, WIDTH, BATCH = 3, 5, 12
EXACT = {"rtol": 0, "atol": 1e-12}  # float64
KINDS: list[type[AdaptiveComputation] | type[PonderNet]] = [AdaptiveComputation, PonderNet]


class Torchs(nn.Module):
    """A recurrent cell of torch, which asks for no rows."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, state: Any, rows: Tensor) -> Any:
        return self.cell(x, state)


class TreeCell(nn.Module):
    """s' = tanh(W(b) [x, s] + c(b)) with a lazy tree."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = random_tree(3, sizes=(INPUTS + 1 + WIDTH, WIDTH), storage="lazy", full_depth=1, rank=2)

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        return torch.tanh(self.tree(torch.cat([x, state], dim=1)))


def make(kind: Any, cell: Callable[..., Any], max_steps: int = 7) -> Any:
    """A halting module whose rows halt apart."""
    ponder = kind(cell, WIDTH, max_steps, 0.05, halting_bias=-1.0).double()
    with torch.no_grad():
        ponder.halting.weight.copy_(torch.linspace(-4, 4, WIDTH))
    return ponder


@pytest.mark.parametrize("make_cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_torchs_cells_ponder(make_cell: Callable[..., nn.Module]) -> None:
    seed_cpu(0)
    ponder = make(AdaptiveComputation, Torchs(make_cell(INPUTS + 1, WIDTH)))
    x, state = torch.randn(BATCH, INPUTS).double(), torch.randn(2, BATCH, WIDTH).double()
    parts = tuple(state) if make_cell is nn.LSTMCell else (state[0],)
    out, stats = ponder(x, parts if len(parts) > 1 else parts[0])
    mean, (steps,), (remainder,), _ = row_by_row(ponder, x, parts)
    torch.testing.assert_close(out if isinstance(out, tuple) else (out,), mean, **EXACT)
    torch.testing.assert_close((stats.steps, stats.remainder), (steps, remainder), **EXACT)
    assert len(steps.unique()) > 1


# ---- a tree that is spread over ranks ----------------------------------------------------------------------------------


def train(rank: int, groups: Groups, ponder: Any, counts: list[int], x: Tensor, state: Tensor) -> dict[str, Any]:
    """A step on this rank's rows of the batch."""
    rows = groups.shard(rank, ponder, lr=0.05)
    ponder.lockstep = rows.world
    ponder.cell.calls = 0
    ponder.cell.register_forward_hook(lambda module, args, output: setattr(module, "calls", module.calls + 1))
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    out, stats = ponder(x[mine], state[mine])
    (groups.size * (out.square().sum() + 0.1 * stats.ponder_cost.sum()) / len(x)).backward()
    grad = rows.world.sum_(ponder.halting.weight.grad.clone()) / groups.size
    rows.reduce_gradients()
    rows.step(lr=0.05, scale=1.0)
    held = {
        (name, key): store.data[place]
        for name, store in ponder.cell.tree.table.stores()
        for place, key in enumerate(store.keys.tolist())
    }
    return {"out": out.detach(), "steps": stats.steps, "grad": grad, "held": held, "calls": ponder.cell.calls}


@pytest.mark.parametrize("counts", [[2, 10], [1, 11], [0, 12], [12, 0]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_tree_ponders_in_lockstep_as_one_rank_would(kind: Any, counts: list[int]) -> None:
    ponder = make(kind, TreeCell())
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, INPUTS, generator=generator, dtype=torch.float64)
    state = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    order = copy.deepcopy(ponder)(x, state)[1].steps.argsort(stable=True)  # the last ranks have the rows that run longest
    x, state = x[order], state[order]
    results = []
    for parts in ([BATCH], counts):
        groups, copies = Groups(len(parts), len(parts)), [copy.deepcopy(ponder) for _ in parts]
        work = [groups, copies, parts]
        results.append(groups.run(lambda rank, work=work: train(rank, work[0], work[1][rank], work[2], x, state)))
    [alone], ranks = results
    assert torch.equal(torch.cat([rank["steps"] for rank in ranks]), alone["steps"])
    torch.testing.assert_close(torch.cat([rank["out"] for rank in ranks]), alone["out"], **EXACT)
    assert {rank["calls"] for rank in ranks} == {int(alone["steps"].max())}
    assert any(not len(rank["steps"]) or rank["steps"].max() < alone["steps"].max() for rank in ranks)  # somebody waited
    for rank in ranks:
        torch.testing.assert_close(rank["grad"], alone["grad"], rtol=0, atol=1e-11)
        for key, row in rank["held"].items():
            torch.testing.assert_close(row, alone["held"][key], rtol=0, atol=1e-9)  # Adam's quotient of small gradients
    assert {key for rank in ranks for key in rank["held"]} == alone["held"].keys()


# ---- what is not right is said in a line -------------------------------------------------------------------------------


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "another width": (lambda x, s, rows: s[:, :-1], r"given a state of \[4, 5\] and returned \[4, 4\]"),
    "two tensors for one": (lambda x, s, rows: (s, s), r"given a state of \[4, 5\] and returned \[4, 5\] and \[4, 5\]"),
    "one row for all": (lambda x, s, rows: s.mean(0, keepdim=True), r"returned \[1, 5\]; it must return as many"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_that_returns_another_state_is_refused(kind: Any, name: str) -> None:
    cell, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make(kind, cell)(torch.zeros(4, INPUTS).double(), torch.zeros(4, WIDTH).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "state", "message"),
    [
        (3, torch.zeros(4, WIDTH), r"x has 3 rows, the state has \[4, 5\]"),
        (4, torch.zeros(4, WIDTH + 1), r"the first tensor of the state is \[4, 6\]; halting needs \[rows, state_size=5\]"),
        (4, torch.zeros(4, WIDTH, 2), r"the first tensor of the state is \[4, 5, 2\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(kind: Any, rows: int, state: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, lambda x, state, rows: state)(torch.zeros(rows, INPUTS).double(), state.double())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_halting_probabilities_that_are_nan_are_refused_unless_asked_for(kind: Any, training: bool) -> None:
    x, state = torch.zeros(4, INPUTS).double(), torch.zeros(4, WIDTH).double()
    state[1] = torch.nan
    ponder = make(kind, lambda x, state, rows: state + 1).train(training)
    with pytest.raises(ValueError, match="halting probabilities are NaN in 1 of 4 rows"):
        ponder(x, state)
    ponder.skips_nan = True
    out, stats = ponder(x, state)
    assert out.isnan().any(1).tolist() == stats.remainder.isnan().tolist() == [False, True, False, False]


def test_a_control_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="num_steps=0 is below 1"):
        FixedComputation(lambda x, state, rows: state, 0)
