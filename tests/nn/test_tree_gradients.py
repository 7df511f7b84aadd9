"""Gradients of TreeLinear: finite differences for what is differentiable, the surrogate's formula for the gates."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distcond.nn import TreeLinear
from distcond.nn.tree_product import TreeProduct
from distcond.optim import RowAdam
from tests.pairs import every_pair
from tests.trees import nodes_of, path, random_tree, tokens

SHAPES: list[dict[str, Any]] = [{}, {"bias": False}, {"full_depth": 0, "rank": 2}, {"full_depth": 1, "rank": 1, "bias": False}]
EXACT = {"rtol": 0, "atol": 1e-12}  # float64; sums of at most 20 tokens x 4 levels x 20 products of size 1


def assert_margin(layer: TreeLinear, x: Tensor, margin: float) -> None:
    """No bit is so close to its threshold that a small step would flip it."""
    assert layer.gate is None or layer.gate(x).abs().min() > margin


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_gradients_of_input_and_nodes_are_finite_differences(depth: int, options: dict[str, Any]) -> None:
    if "full_depth" in options:
        options = options | {"full_depth": min(options["full_depth"], depth)}
    layer = random_tree(depth, sizes=(3, 2), gate_gradient="none", **options).eval()
    x = tokens(4, 3).requires_grad_()
    assert_margin(layer, x, 1e-3)  # gradcheck moves by 1e-6
    nodes = {name: value for name, value in layer.named_parameters() if not name.startswith("gate.") and value.numel()}

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(nodes, values, strict=True)), (x,))

    # Products of at most three factors: central differences are exact to 1e-6**2 and rounding, 1e-16 / 1e-6.
    assert torch.autograd.gradcheck(function, (x, *nodes.values()), atol=1e-8, rtol=0)


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_without_a_gate_gradient_the_gates_do_not_learn(storage: str) -> None:
    layer = random_tree(3, storage=storage, gate_gradient="none")
    layer(tokens(6).requires_grad_()).square().sum().backward()
    assert layer.gate is not None and layer.gate.weight.grad is None
    assert "gate.weight" not in dict(layer.named_parameters())  # or an optimiser's weight decay would shrink it


def surrogate(layer: TreeLinear, x: Tensor, gate_weight: Tensor) -> Tensor:
    """sum_l (1 + t_l - stopgrad(t_l)) (U_l x + c_l), t_l = tanh|g_l|, token by token; the root carries no factor.

    With `magnitude`, sum_l t_l (U_l x + c_l). With `flip`, levels carry no factor, and for each bit is added
    (s_l - stopgrad(s_l)) (W(b') x + c(b') - W(b) x - c(b)), s_l = tanh(g_l) / 2 towards the other value of the bit.
    """
    matrices, biases = nodes_of(layer)
    assert layer.gate is not None
    gates = x @ gate_weight.T - (layer.gate.running_mean if layer.gate.kind != "sign" else 0.0)
    outputs = []
    for token, gate, leaf in zip(x, gates, layer.leaf(x.detach())[:, 0].tolist(), strict=True):
        root, *nodes = path(leaf, layer.depth)
        y = matrices[root] @ token + biases[root]
        for t, node in zip(gate.abs().tanh(), nodes, strict=True):
            factor = {"magnitude": t, "flip": t * 0 + 1}.get(layer.gate_gradient, 1 + t - t.detach())
            y = y + factor * (matrices[node] @ token + biases[node])
        outputs.append(y)
        for bit in range(layer.depth if layer.gate_gradient == "flip" else 0):
            others = path(leaf ^ (1 << (layer.depth - 1 - bit)), layer.depth)
            other = sum(matrices[node] @ token + biases[node] for node in others)
            s = gate[bit].tanh() / 2 * (-1 if gate[bit] > 0 else 1)
            outputs[-1] = outputs[-1] + (s - s.detach()) * (other - y).detach()
    return torch.stack(outputs)


GATES = [(gate, gradient) for gate in ("linear", "hash", "sign") for gradient in ("straight_through", "magnitude", "flip")]


@pytest.mark.parametrize(("kind", "options", "storage"), every_pair(GATES, SHAPES, ["dense", "lazy"]))
def test_gradient_and_output_are_those_of_the_formula(kind: tuple[str, str], options: dict[str, Any], storage: str) -> None:
    gate, gate_gradient = kind
    layer = random_tree(4, storage=storage, gate=gate, gate_gradient=gate_gradient, **options)
    assert layer.gate is not None
    x = tokens(12).requires_grad_()
    planes = torch.eye(4, 5, dtype=torch.float64) if gate == "sign" else layer.gate.weight.detach().clone()
    planes.requires_grad_()
    expected = surrogate(layer, x, planes)
    grad_y = tokens(12, 4, seed=7)
    wanted_x, wanted_planes = torch.autograd.grad(expected, (x, planes), grad_y)
    y = layer(x)
    torch.testing.assert_close(y, expected, **EXACT)
    y.backward(grad_y)
    torch.testing.assert_close(x.grad, wanted_x, **EXACT)
    if gate == "linear":
        torch.testing.assert_close(layer.gate.weight.grad, wanted_planes, **EXACT)
    assert wanted_planes.abs().max() > 0.1  # there was something to learn


@pytest.mark.parametrize(("options", "depth", "gate"), every_pair(SHAPES, [1, 2], ["linear", "sign"]))
def test_all_gradients_of_magnitude_are_finite_differences(options: dict[str, Any], depth: int, gate: str) -> None:
    if "full_depth" in options:
        options = options | {"full_depth": min(options["full_depth"], depth)}
    layer = random_tree(depth, sizes=(3, 2), gate=gate, gate_gradient="magnitude", **options).eval()
    x = tokens(4, 3).requires_grad_()
    assert_margin(layer, x, 1e-3)  # gradcheck moves by 1e-6
    values = {name: value for name, value in layer.named_parameters() if value.numel()}
    assert ("gate.weight" in values) == (gate == "linear")

    def function(x: Tensor, *parts: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(values, parts, strict=True)), (x,))

    # Central differences: third derivatives of size 10 times 1e-6**2, and rounding, 1e-16 / 1e-6.
    assert torch.autograd.gradcheck(function, (x, *values.values()), atol=1e-8, rtol=0)


def test_with_magnitude_the_layer_is_continuous_where_the_last_bit_flips() -> None:
    layer = random_tree(3, gate="sign", gate_gradient="magnitude", sizes=(3, 2))
    x = tokens(1, 3).repeat(2, 1)
    x[:, 2] = torch.tensor([-1e-9, 1e-9])
    below, above = layer(x)
    assert layer.leaf(x)[0] != layer.leaf(x)[1]
    torch.testing.assert_close(below, above, rtol=0, atol=1e-7)  # 2e-9 times slopes below 10
    jump = random_tree(3, gate="sign", sizes=(3, 2))(x)
    assert (jump[0] - jump[1]).abs().max() > 0.1


@pytest.mark.parametrize("options", SHAPES)
def test_one_flip_a_step_takes_the_levels_in_turn_and_is_all_of_them_on_average(options: dict[str, Any]) -> None:
    grads: dict[str, list[tuple[Tensor, Tensor]]] = {"flip": [], "flip_sampled": []}
    for gate_gradient, found in grads.items():
        layer = random_tree(4, gate_gradient=gate_gradient, **options).eval()  # which keeps the thresholds
        assert layer.gate is not None
        for commits in range(4):
            layer.gate.num_commits.fill_(commits)
            x, layer.gate.weight.grad = tokens(12).requires_grad_(), None
            layer(x).square().sum().backward()
            assert x.grad is not None
            found.append((x.grad, layer.gate.weight.grad))
    learning = torch.stack([planes.abs().amax(1) > 0 for _, planes in grads["flip_sampled"]])
    assert learning.sum(0).tolist() == learning.sum(1).tolist() == [1, 1, 1, 1]
    for full, one in zip(zip(*grads["flip"], strict=True), zip(*grads["flip_sampled"], strict=True), strict=True):
        torch.testing.assert_close(torch.stack(one).mean(0), full[0], **EXACT)


def test_nothing_is_flipped_where_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, products = random_tree(3, gate_gradient="flip"), []
    apply = TreeProduct.apply
    monkeypatch.setattr(TreeProduct, "apply", lambda *inputs: products.append(1) or apply(*inputs))
    layer(tokens(5))
    assert len(products) == 4
    with torch.no_grad():
        layer(tokens(5))
    assert len(products) == 5


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_sampled_gradient_takes_the_full_levels_in_turn_and_is_straight_through_on_average(
    storage: str, options: dict[str, Any]
) -> None:
    grads: dict[str, list[tuple[Tensor, Tensor]]] = {"straight_through": [], "sampled": []}
    for gate_gradient, found in grads.items():
        layer = random_tree(4, storage=storage, gate_gradient=gate_gradient, **options).eval()  # which keeps the thresholds
        assert layer.gate is not None
        for commits in range(max(1, options.get("full_depth", 4))):
            layer.gate.num_commits.fill_(commits)
            x, layer.gate.weight.grad = tokens(12).requires_grad_(), None
            layer(x).square().sum().backward()
            assert x.grad is not None
            found.append((x.grad, layer.gate.weight.grad))
    learning = [planes.abs().amax(1) > 0 for _, planes in grads["sampled"]]
    full_depth, steps = options.get("full_depth", 4), len(learning)
    assert torch.stack(learning).sum(0).tolist() == [1] * full_depth + [steps] * (4 - full_depth)
    assert torch.stack(learning).sum(1).tolist() == [min(1, full_depth) + 4 - full_depth] * steps
    for full, sampled in zip(zip(*grads["straight_through"], strict=True), zip(*grads["sampled"], strict=True), strict=True):
        torch.testing.assert_close(torch.stack(sampled).mean(0), full[0], **EXACT)


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_nodes_learn_the_same_whether_or_not_the_gates_do(storage: str, options: dict[str, Any]) -> None:
    """The factor of the surrogate is 1: it changes no gradient but that of the gates."""
    grads = []
    for gate_gradient in ("straight_through", "sampled", "none"):
        layer = random_tree(3, storage=storage, gate_gradient=gate_gradient, **options)
        layer(tokens(12)).square().sum().backward()
        if layer.table is not None:
            grads.append([grad for _, store in layer.table.stores() for grad in store.take_gradient()])
        else:
            grads.append([value.grad for name, value in layer.named_parameters() if not name.startswith("gate.")])
    assert grads[0]
    for one, *others in zip(*grads, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("options", SHAPES)
def test_a_lazy_layer_has_the_gradient_of_a_dense_one(options: dict[str, Any]) -> None:
    """Seen through one plain gradient step, whose update of W(b) is the gradient, on nodes of both kinds."""
    dense, lazy = (random_tree(3, storage=storage, **options) for storage in ("dense", "lazy"))
    assert dense.gate is not None and lazy.gate is not None and lazy.table is not None
    with torch.no_grad():
        matrices = lazy.table.tensors()
        for parameter, stored in zip((dense.weight, dense.right, dense.left), (matrices[0], *matrices[2:]), strict=True):
            parameter.copy_(stored)  # rows of a table that was filled at once are in the order of the ids
        if dense.has_bias:
            dense.bias.copy_(matrices.bias_SP)
        dense.gate.running_mean.copy_(lazy.gate.running_mean)
    x = tokens(12)
    for layer in (dense, lazy):
        layer(x).square().sum().backward()
    torch.testing.assert_close(dense.gate.weight.grad, lazy.gate.weight.grad, **EXACT)
    for name, store in lazy.table.stores():
        rows, grad = store.take_gradient()
        names = ("weight", "bias") if name == "full" else ("right", "left")
        rest = torch.zeros(store.size, store.width, dtype=torch.float64)
        rest[rows] = grad
        parts = [getattr(dense, part).grad.flatten(1) for part in names if len(getattr(dense, part))]
        torch.testing.assert_close(rest, torch.cat(parts, dim=1), **EXACT)


def test_gradients_of_several_calls_add_up_before_a_step() -> None:
    """A layer called at every ponder step and micro-batch learns from all of them."""
    changes = []
    for calls in (1, 3):
        layer = random_tree(3, storage="lazy", full_depth=1, rank=2)
        optimizer = RowAdam(layer, lr=0.1)
        assert layer.gate is not None
        for part in tokens(12).chunk(calls):
            layer(part).square().sum().backward()
        optimizer.step()
        changes.append((nodes_of(layer), layer.gate.running_mean))
    torch.testing.assert_close(changes[0], changes[1], rtol=0, atol=1e-9)  # Adam divides by roots: 1e-13 grows


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_activation_checkpointing_changes_nothing(storage: str, use_reentrant: bool) -> None:
    """A layer that is called twice, as over ponder steps, and called again by the backward pass."""
    results = []
    for saves in (False, True):
        layer = random_tree(3, sizes=(4, 4), storage=storage)
        assert layer.gate is not None
        x = y = tokens(12, 4).requires_grad_()
        for _ in range(2):
            y = checkpoint(layer, y, use_reentrant=use_reentrant) if saves else layer(y)
        y.square().sum().backward()
        nodes = layer.weight.grad if layer.table is None else layer.table.full.take_gradient()
        results.append((x.grad, layer.gate.weight.grad, layer.gate.take_statistics(), nodes))
    torch.testing.assert_close(results[0], results[1], **EXACT)
