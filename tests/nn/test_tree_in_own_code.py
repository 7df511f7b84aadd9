"""What users do with a layer in training code of their own: move it, save it, accumulate, check-point activations."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distcond.nn import AdaptiveComputation, PonderNet, TreeLinear, flatten
from distcond.optim import RowAdam


def make(storage: str = "dense", **options: Any) -> TreeLinear:
    torch.manual_seed(0)
    layer = TreeLinear(6, 4, 3, storage=storage, **options)
    for parameter in layer.node_parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def tokens(number: int = 16) -> Tensor:
    return torch.randn(number, 6, generator=torch.Generator().manual_seed(1))


def train(layer: TreeLinear, optimizers: Sequence[RowAdam | torch.optim.Optimizer], number: int) -> list[float]:
    losses = []
    for _ in range(number):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = (layer(tokens()) - 1).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("storage", ["dense", "lazy", "host"])
def test_a_layer_changes_its_precision_between_two_backward_passes(storage: str, kernels: str) -> None:
    layer, x = make(storage).eval(), tokens()
    for dtype in (torch.float32, torch.float64, torch.float32):
        layer.to(dtype)
        layer(x.to(dtype)).sum().backward()
        RowAdam(layer).zero_grad()
    given = x.clone().requires_grad_()
    layer(given).sum().backward()
    (expected,) = torch.autograd.grad(copy.deepcopy(layer).double()(twin := x.double().requires_grad_()).sum(), twin)
    torch.testing.assert_close(given.grad, expected.float())


def test_nodes_that_are_not_contiguous_are_computed_with(kernels: str) -> None:
    layer, x = make(), tokens()
    expected = layer(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["weight"] = state["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    layer.load_state_dict(state, assign=True)
    assert not layer.weight.is_contiguous()
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["straight_through", "sampled", "flip_sampled"])
def test_a_saved_layer_goes_on_as_if_it_had_not_been_saved(kind: str) -> None:
    layer = make(gate_gradient=kind)
    adam = torch.optim.Adam(layer.parameters(), 0.1)
    train(layer, [adam], 2)
    twin = make(gate_gradient=kind)
    twin_adam = torch.optim.Adam(twin.parameters(), 0.1)
    train(twin, [twin_adam], 1)  # what it has staged is not that of the state which it is given
    twin.load_state_dict(copy.deepcopy(layer.state_dict()))
    twin_adam.load_state_dict(copy.deepcopy(adam.state_dict()))
    assert train(twin, [twin_adam], 4) == train(layer, [adam], 4)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in layer.state_dict().items())


def with_optimizers(storage: str) -> tuple[TreeLinear, RowAdam, torch.optim.Optimizer]:
    layer = make(storage, full_depth=2, rank=2)
    assert layer.gate is not None
    return layer, RowAdam(layer, lr=0.1, weight_decay=0.1), torch.optim.Adam(layer.gate.parameters(), 0.1)


@pytest.mark.parametrize("storage", ["dense", "lazy", "host"])
def test_a_layer_and_its_optimizers_are_saved_as_torch_saves(storage: str, tmp_path: Path) -> None:
    layer, rows, adam = with_optimizers(storage)
    train(layer, [rows, adam], 3)
    torch.save([part.state_dict() for part in (layer, rows, adam)], tmp_path / "state.pt")
    twin, *twin_optimizers = with_optimizers(storage)
    train(twin, twin_optimizers, 2)
    for part, state in zip([twin, *twin_optimizers], torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert train(twin, twin_optimizers, 4) == train(layer, [rows, adam], 4)
    other = RowAdam(TreeLinear(6, 4, 3, storage=storage, full_depth=2, rank=2))
    if storage != "dense":
        with pytest.raises(ValueError, match="load the state of the module that it was saved with first"):
            other.load_state_dict(rows.state_dict())


@pytest.mark.parametrize("reentrant", [True, False])
def test_thresholds_follow_under_activation_checkpointing(reentrant: bool) -> None:
    plain, layer = make(), make()
    for _ in range(3):
        plain(tokens().requires_grad_()).sum().backward()
        checkpoint(layer, tokens().requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert plain.gate is not None and layer.gate is not None
    assert int(layer.gate.num_commits) == 2
    torch.testing.assert_close(layer.gate.running_mean, plain.gate.running_mean)


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_a_step_before_the_backward_pass_is_refused(storage: str) -> None:
    layer = make(storage)
    rows = RowAdam(layer)
    first, second = layer(tokens()).sum(), layer(tokens()).sum()
    first.backward()
    rows.step()
    with pytest.raises(RuntimeError, match="call backward before its step"):
        second.backward()
    layer(tokens()).sum().backward()


def test_a_forward_pass_is_counted_once_however_often_backward_runs() -> None:
    layer = make("lazy", min_visits=100)
    loss = layer(x := tokens().requires_grad_()).sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert layer.gate is not None and layer.table is not None
    assert layer.gate.take_statistics()[-1] == 16
    asked = layer.table.growth.take_staged()
    assert int(asked.count_G.sum()) == 16


def test_second_derivatives_of_flipped_gates_are_refused() -> None:
    layer = make(gate_gradient="flip")
    assert layer.gate is not None
    (grad,) = torch.autograd.grad(layer(tokens()).square().sum(), layer.gate.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of first order alone"):
        grad.square().sum().backward()


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_places_outside_the_tree_are_refused(storage: str) -> None:
    layer = make(storage)
    for ask, message in (
        (lambda: layer.node_weight(15), r"node_id=15 is outside 0\.\.14"),
        (lambda: layer.node_weight(-1), r"node_id=-1 is outside"),
        (lambda: layer.node_bias(0, tree=1), r"tree=1 is outside 0\.\.0"),
        (lambda: layer.effective_weight(8), r"leaf=8 is outside 0\.\.7"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    leaf = layer.leaf(tokens(1))
    weight, bias = layer.effective_weight(leaf)
    torch.testing.assert_close(layer(tokens(1)), tokens(1) @ weight.t() + bias)
    assert not layer.node_weight(0).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 2.0}, "depth=2.0 is no whole number"),
        ({"depth": "3"}, "depth='3' is no whole number"),
        ({"depth": 3, "num_trees": 1.0}, "num_trees=1.0 is no whole number"),
        ({"depth": 3, "rank": -4}, "rank=-4"),
        ({"depth": 3, "storage": "lazy", "min_visits": 2.5}, "min_visits=2.5 is no whole number"),
        ({"depth": 3, "storage": "lazy", "max_nodes": 7.5}, "max_nodes=7.5 is no whole number"),
    ],
)
def test_options_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeLinear(4, 4, **options)


@pytest.mark.parametrize("kind", [AdaptiveComputation, PonderNet])
def test_a_state_may_be_more_exact_than_the_input(kind: type[AdaptiveComputation] | type[PonderNet]) -> None:
    def cell(x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        return (state + x[:, :1]).tanh()

    ponder = kind(cell, 3, max_steps=5, halting_bias=0)
    x, state = torch.randn(4, 2), torch.zeros(4, 3, dtype=torch.float64)
    out, stats = ponder(x, state)
    assert out.dtype == stats.remainder.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize("is_flat", [False, True])
def test_a_trace_which_would_keep_the_nodes_of_its_example_is_refused(is_flat: bool) -> None:
    layer = flatten(make().eval()) if is_flat else make().eval()
    with pytest.raises(RuntimeError, match=r"a trace would keep the nodes that its example picked .*; use torch.compile instead"):
        torch.jit.trace(layer, tokens())
