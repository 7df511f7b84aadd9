"""The product as an autograd function: what a backward pass leaves behind, what it refuses, and what `torch.compile` sees."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distcond.nn import TreeLinear
from distcond.optim import RowAdam
from tests.pairs import every_pair
from tests.trees import nodes_of, random_tree, seed_cpu, tokens

# ---- gradients of gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "gradient", "storage"),
    every_pair(["tanh", "sum"], ["straight_through", "magnitude", "flip", "none"], ["dense", "lazy"]),
)
def test_a_gradient_that_is_differentiated_again_is_refused(kernels: str, storage: str, gradient: str, loss: str) -> None:
    """The gradient of a plain sum is made of nodes alone, which ask for a gradient even so."""
    layer = random_tree(2, dtype=torch.float32, storage=storage, gate_gradient=gradient)
    x = tokens(7).float().requires_grad_()
    y = layer(x).tanh() if loss == "tanh" else layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a TreeLinear has gradients of first order alone"):
        (grad.square().sum() + x.square().sum()).backward()
    assert torch.equal(grad, torch.autograd.grad(layer(x).tanh().sum() if loss == "tanh" else layer(x).sum(), x)[0])


# ---- what nobody asked for -------------------------------------------------------------------------------------------

LAYERS: list[dict[str, Any]] = [
    {"storage": "dense"},
    {"storage": "lazy"},
    {"storage": "lazy", "gate_gradient": "flip"},
    {"storage": "lazy", "gate_gradient": "magnitude", "num_trees": 2},
    {"storage": "lazy", "max_nodes": 6},
    {"storage": "lazy", "min_visits": 3, "max_nodes": 6},
    {"storage": "host"},
]


def make(options: dict[str, Any]) -> TreeLinear:
    seed_cpu(0)
    return TreeLinear(5, 4, 3, full_depth=1, rank=2, **options)


def by_grad(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(layer(x).square().sum(), x)[0]


def by_inputs(layer: nn.Module, x: Tensor) -> Tensor:
    layer(x).square().sum().backward(inputs=[x])
    assert x.grad is not None
    return x.grad


def by_checkpoint(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)[0]


def by_backward(layer: nn.Module, x: Tensor) -> Tensor:
    layer(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


def train(layer: TreeLinear, between: Callable[[TreeLinear], object] = id) -> tuple[Any, ...]:
    """All that some steps leave; `between` is called beside each."""
    optimizer = RowAdam(layer, lr=0.05)
    for step in range(4):
        layer(tokens(9, seed=step).float()).square().sum().backward()
        between(layer)
        optimizer.step()
        optimizer.zero_grad()
        between(layer)
    assert layer.gate is not None
    return *nodes_of(layer), layer.gate.running_mean, layer.num_materialized, layer.layout.growth.take_capped()


@pytest.mark.parametrize("way", [by_grad, by_inputs, by_checkpoint])
@pytest.mark.parametrize("options", LAYERS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_gradient_of_inputs_alone_leaves_training_as_it_is(options: dict[str, Any], way: Callable[..., Tensor]) -> None:
    def look(layer: TreeLinear) -> None:
        x = tokens(30, seed=50).float().requires_grad_()
        before, born = layer.layout.num_removals, layer.num_materialized
        got = way(layer, x)
        assert (layer.layout.num_removals, layer.num_materialized) == (before, born)
        twin = copy.deepcopy(layer)
        assert torch.equal(got, by_backward(twin, x.detach().requires_grad_()))

    for one, other in zip(train(make(options)), train(make(options), look), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("options", LAYERS[1:], ids=lambda options: "-".join(map(str, options.values())))
def test_frozen_rows_neither_learn_nor_grow_and_pass_the_same_gradient(options: dict[str, Any]) -> None:
    layer, free = make(options), make(options)
    for tree in (layer, free):
        train(tree)
    nn.Sequential(nn.Tanh(), layer).apply(lambda module: module.requires_grad_(False))
    assert layer.table is not None
    before = (*nodes_of(layer), layer.num_materialized)
    x = tokens(40, seed=50).float()
    grads = [by_backward(tree, x.detach().requires_grad_()) for tree in (layer, free)]
    assert torch.equal(*grads) and not layer(x).requires_grad
    assert not layer.table.full.take_gradient()[0].numel() and not len(layer.table.growth.take_staged().keys_G)
    assert layer.table.growth.take_capped() == 0
    RowAdam(layer, lr=0.05).step()
    after = (*nodes_of(layer), layer.num_materialized)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2] == after[2]
    layer.requires_grad_(True)
    layer(x).square().sum().backward()
    assert layer.table.full.take_gradient()[0].numel()


@pytest.mark.parametrize("asks", ["input", "nothing"])
def test_a_gradient_of_the_nodes_alone_counts_as_training(asks: str) -> None:
    layer = random_tree(3)
    x = tokens(9).requires_grad_(asks == "input")
    grads = torch.autograd.grad(layer(x).square().sum(), layer.node_parameters()[:2])
    assert layer.gate is not None and float(layer.gate.take_statistics()[-1]) == 9
    layer(x).square().sum().backward()
    assert torch.equal(grads[0], layer.weight.grad) and torch.equal(grads[1], layer.bias.grad)


@pytest.mark.parametrize("count", [2, 200])  # some nodes are touched; all are
def test_gradients_of_one_pass_outlive_the_next(count: int) -> None:
    layer = random_tree(3, full_depth=1, rank=2).eval()

    def gradients(seed: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(tokens(count, seed=seed)).square().sum(), layer.node_parameters())

    first = gradients(1)
    kept = [grad.clone() for grad in first]
    second = gradients(2)
    assert all(map(torch.equal, first, kept)) and not any(map(torch.equal, first, second))


def test_gradients_of_touched_nodes_do_not_depend_on_whether_all_are() -> None:
    layer, rows = random_tree(3, full_depth=1, rank=2).eval(), tokens(200)
    is_left = layer.leaf(rows)[:, 0] < 4
    assert len(layer.leaf(rows).unique()) == 8
    some = torch.autograd.grad(layer(rows[is_left]).square().sum(), layer.node_parameters())
    every = torch.autograd.grad((is_left[:, None] * layer(rows).square()).sum(), layer.node_parameters())
    for grad, wanted in zip(some, every, strict=True):
        torch.testing.assert_close(grad, wanted)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


class Between(nn.Module):
    """A tree between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        seed_cpu(0)
        self.before, self.tree, self.behind = nn.Linear(5, 5), TreeLinear(5, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.tree(self.before(x).relu()).relu())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which dynamo looks at
def test_compile_breaks_its_graph_once_and_computes_the_same() -> None:
    model, x = Between(), tokens(9).float()
    explained = torch._dynamo.explain(copy.deepcopy(model))(x)
    assert (explained.graph_count, explained.graph_break_count) == (2, 1)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    for count in (9, 4, 1, 30):
        x = tokens(count).float()
        y, wanted = compiled(x), model(x)
        y.square().sum().backward(), wanted.square().sum().backward()
        assert torch.equal(y, wanted)
    wanted_grads = [parameter.grad for parameter in model.parameters()]
    for parameter, grad in zip(compiled.parameters(), wanted_grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    torch._dynamo.reset()


@pytest.mark.thorough
def test_nothing_that_is_not_compiled_imports_dynamo() -> None:
    """It takes seconds."""
    work = (
        "import sys, torch, distcond; from distcond.nn import TreeLinear; "
        "TreeLinear(5, 4, 3)(torch.ones(2, 5)).sum().backward(); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", work], check=False).returncode == 0
