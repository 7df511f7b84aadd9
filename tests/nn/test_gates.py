"""Gates: thresholds follow the mean of the global batch, committed once per applied step, and keep bits balanced."""

import pytest
import torch
from torch import Tensor

from distcond.nn import TreeLinear
from distcond.nn.gates import MOMENTUM, Gate
from distcond.optim import RowAdam
from tests.trees import random_tree, seed_cpu, tokens

EXACT = {"rtol": 0, "atol": 1e-13}  # float64 means of numbers of size 1 to 10


def make_gate(seed: int = 0) -> Gate:
    seed_cpu(seed)
    return Gate(5, 3, "linear").double()


def see(gate: Gate, x: Tensor) -> None:
    gate.stage(gate.statistics(gate(x)))


def mean(gate: Gate, x: Tensor) -> Tensor:
    return (x @ gate.weight.detach().T).mean(0)


def test_first_commit_initialises_and_later_ones_move_by_a_hundredth() -> None:
    gate, first, second = make_gate(), tokens(20), tokens(30, seed=2) + 3.0
    see(gate, first)
    gate.commit(gate.take_statistics())
    torch.testing.assert_close(gate.running_mean, mean(gate, first), **EXACT)
    see(gate, second)
    gate.commit(gate.take_statistics())
    expected = MOMENTUM * mean(gate, first) + (1 - MOMENTUM) * mean(gate, second)
    torch.testing.assert_close(gate.running_mean, expected, **EXACT)
    assert MOMENTUM == 0.99 and int(gate.num_commits) == 2


def test_micro_batches_and_ranks_are_pooled_by_their_numbers_of_rows() -> None:
    gate, x = make_gate(), tokens(20)
    other = make_gate()
    for part in x[:13].split([1, 0, 12]):
        see(gate, part)
    see(other, x[13:])
    gate.commit(gate.take_statistics() + other.take_statistics())
    torch.testing.assert_close(gate.running_mean, mean(gate, x), **EXACT)


def test_thresholds_of_a_step_are_those_of_the_step_before() -> None:
    gate, x = make_gate(), tokens(20) + 1.0
    before = gate(x)
    see(gate, x)
    assert torch.equal(gate(x), before)
    gate.commit(gate.take_statistics())
    torch.testing.assert_close(gate(x), before - mean(gate, x), **EXACT)


def test_a_step_without_rows_commits_nothing() -> None:
    gate = make_gate()
    see(gate, tokens(0))
    gate.commit(gate.take_statistics())
    assert int(gate.num_commits) == 0 and not gate.running_mean.any()


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_a_training_pass_stages_its_rows_once_and_other_passes_none(storage: str) -> None:
    layer = random_tree(3, storage=storage)
    gate, x = layer.gate, tokens(20)
    assert gate is not None
    layer.eval()(x).sum().backward()
    layer.train()
    with torch.no_grad():
        layer(x)
    layer(x), layer.codes(x), layer.leaf(x)  # forward alone
    assert not gate.take_statistics().any()
    layer(x).sum().backward()
    statistics = gate.take_statistics()
    torch.testing.assert_close(statistics[:-1] / 20, mean(gate, x), **EXACT)
    assert float(statistics[-1]) == 20.0
    assert not gate.take_statistics().any()


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_evaluation_freezes_the_thresholds_even_with_gradients(storage: str) -> None:
    layer = random_tree(3, storage=storage).eval()
    optimizer = RowAdam(layer, lr=0.0)
    assert layer.gate is not None
    before = layer.gate.running_mean.clone()
    for _ in range(2):
        layer(tokens(20) + 3.0).sum().backward()
        optimizer.step()
    assert torch.equal(layer.gate.running_mean, before) and int(layer.gate.num_commits) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pre_activations_are_float32_at_least(dtype: torch.dtype) -> None:
    gate = make_gate().to(dtype)
    x = tokens(20).to(dtype)
    out = gate(x)
    assert out.dtype == torch.float32
    expected = x.double() @ gate.weight.detach().double().T - gate.running_mean.double()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)  # five products of size 1 to 10 in float32
    assert gate(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("storage", "optimizer"), [("dense", "RowAdam"), ("lazy", "RowAdam"), ("dense", "torch")])
def test_a_step_commits_what_its_micro_batches_staged(storage: str, optimizer: str) -> None:
    """RowAdam commits at its step; a dense layer under another optimiser at the first forward after a backward."""
    layer = random_tree(3, storage=storage)
    gate = layer.gate
    assert gate is not None
    rows = RowAdam(layer, lr=0.0) if optimizer == "RowAdam" else None
    gate.running_mean.zero_()
    x = tokens(20) + 1.0
    outputs = [layer(part) for part in x.split([8, 0, 12])]  # several forwards, then their backwards: ponder steps
    torch.cat(outputs).sum().backward()
    assert not gate.running_mean.any()
    if rows is not None:
        rows.step()
    else:
        layer(x)
    torch.testing.assert_close(gate.running_mean, mean(gate, x), **EXACT)
    assert int(gate.num_commits) == 1


@pytest.mark.parametrize("kind", ["linear", "hash"])
@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_bits_are_balanced_after_a_few_steps(storage: str, kind: str) -> None:
    seed_cpu(0)
    layer = TreeLinear(5, 4, 4, storage=storage, gate=kind)
    optimizer = RowAdam(layer, lr=1e-3)

    def share_of_ones() -> Tensor:
        return layer.codes(tokens(2000, seed=99).float() + 2.0)[:, 0].double().mean(0)

    assert (share_of_ones() - 0.5).abs().max() > 0.3
    for step in range(5):
        layer(tokens(2000, seed=step).float() + 2.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # Normal tokens: mean = median. Five standard errors of 2000 tokens here, and of 2000 in the first commit.
    assert (share_of_ones() - 0.5).abs().max() < 5 * (2 * 0.25 / 2000) ** 0.5


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate='sigmoid' is unknown; use one of \('linear', 'hash', 'sign'\)"):
        Gate(5, 3, "sigmoid")


def test_sign_bits_are_the_signs_of_the_first_inputs_whatever_was_committed() -> None:
    gate = Gate(5, 3, "sign").double()
    x = tokens(40) + 1.0
    see(gate, x)
    gate.commit(gate.take_statistics())
    assert torch.equal(gate(x), x[:, :3]) and int(gate.num_commits) == 1
    assert not gate.running_mean.any() and not list(gate.parameters())
    assert gate(x.bfloat16()).dtype == torch.float32


def test_more_sign_bits_than_inputs_are_refused() -> None:
    Gate(3, 3, "sign")
    with pytest.raises(ValueError, match="gate='sign' takes its 4 bits from as many inputs, but there are 3"):
        Gate(3, 4, "sign")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thresholds_follow_a_slow_drift_whatever_the_precision_of_the_model(dtype: torch.dtype) -> None:
    """A hundredth of a small change is lost in bf16, whose neighbours of 1 are 2**-8 apart."""
    gate = make_gate().to(dtype)
    for mean_of_step in [1.0] + [1.1] * 200:
        gate.commit(torch.tensor([mean_of_step, mean_of_step, mean_of_step, 1.0], dtype=torch.float64))
    assert gate.running_mean.tolist() == pytest.approx([1.1 - 0.1 * MOMENTUM**200] * 3, rel=1e-4)  # 200 roundings in float32


def test_a_bit_that_a_tree_was_given_later_begins_with_the_mean_of_its_first_commit() -> None:
    gate, means = Gate(5, 3, "linear"), torch.tensor([3.0, 5.0, 7.0])
    gate.num_commits += 100
    gate.running_mean[:2] = torch.tensor([1.0, 2.0])
    for expected in ([1.02, 2.03, 7.0], [1.02 + 0.0198, 2.03 + 0.0297, 7.0]):
        gate.commit(torch.cat([4 * means.double(), torch.tensor([4.0]).double()]))
        torch.testing.assert_close(gate.running_mean, torch.tensor(expected))
