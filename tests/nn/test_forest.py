"""TreeLinear of several trees: each computes its part of the outputs as a layer of its own would."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcond.nn import TreeLinear
from tests.pairs import every_pair
from tests.trees import random_tree, seed_cpu, token_by_token, tokens

DEPTH, IN, OUT = 2, 6, 6
FORESTS: list[dict[str, Any]] = [
    {"num_trees": 2},
    {"num_trees": 3, "bias": False},
    {"num_trees": 3, "full_depth": 0, "rank": 2},
    {"num_trees": 2, "full_depth": 1, "rank": 1, "bias": False},
]
EXACT = {"rtol": 0, "atol": 1e-12}  # float64; sums of at most 12 tokens x 3 levels x 20 products of size 1


def make_forest(depth: int = DEPTH, **options: Any) -> TreeLinear:
    return random_tree(depth, sizes=(IN, OUT), **options)


# ---- one matrix per leaf of a tree -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "gate", "gate_gradient", "storage"),
    every_pair(FORESTS, ["linear", "hash", "sign"], ["straight_through", "sampled", "none"], ["dense", "lazy"]),
)
def test_output_is_the_effective_weight_of_each_trees_leaf_times_x(
    options: dict[str, Any], gate: str, gate_gradient: str, storage: str
) -> None:
    dtype = torch.float64 if storage == "dense" else torch.float32
    layer = make_forest(storage=storage, dtype=dtype, gate=gate, gate_gradient=gate_gradient, **options)
    x = tokens(9, IN).to(dtype)
    # float32: 3 levels x 6 products, each rounded by at most 6e-8 of partial sums below 20.
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 0, "atol": 2.5e-5}
    torch.testing.assert_close(layer(x), token_by_token(layer, x), **tolerance)


@pytest.mark.parametrize("storage", ["dense", "lazy"])
@pytest.mark.parametrize("depth", [0, 1, 7])
def test_codes_and_leaves_have_an_axis_of_trees(depth: int, storage: str) -> None:
    layer = make_forest(depth, storage=storage, num_trees=3)
    for leading in [(), (0,), (4,), (2, 3)]:
        x = tokens(int(torch.tensor(leading).prod()), IN).view(*leading, IN)
        codes, leaf = layer.codes(x), layer.leaf(x)
        assert codes.shape == (*leading, 3, depth) and leaf.shape == (*leading, 3)
        assert torch.equal(
            leaf, sum((codes[..., bit].long() << (depth - 1 - bit) for bit in range(depth)), torch.zeros_like(leaf))
        )
        assert layer(x).shape == (*leading, OUT)
    assert layer.node_weight(0, tree=2).shape == (OUT // 3, IN)


@pytest.mark.parametrize("storage", ["dense", "lazy"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_trees", [2, 3])
def test_from_linear_computes_the_same_function(num_trees: int, bias: bool, storage: str) -> None:
    seed_cpu(0)
    linear = nn.Linear(IN, OUT, bias=bias).double()
    x = tokens(30, IN)
    for depth in (0, 3):
        layer = TreeLinear.from_linear(linear, depth, storage=storage, num_trees=num_trees, full_depth=depth // 2, rank=2)
        torch.testing.assert_close(layer(x), linear(x), **EXACT)


# ---- as many layers of one tree --------------------------------------------------------------------------------------


def rows_of_tree(forest: TreeLinear, tree: int, kind: str) -> Tensor:
    """Where the nodes of a tree are among a forest's parameters, or the rows of its filled table, in heap order.

    Level follows level, and in a level tree follows tree; full nodes and low-rank ones count from 0 each.
    """
    trees, split = forest.num_trees, forest.full_depth + 1
    levels = range(split) if kind == "full" else range(split, forest.depth + 1)
    first_low = trees * (2**split - 1) if kind == "low" else 0
    rows = [trees * (2**level - 1) + (tree << level) + torch.arange(2**level) - first_low for level in levels]
    return torch.cat([torch.arange(0), *rows])


def nodes_by_kind(layer: TreeLinear) -> list[tuple[str, Tensor, Tensor | None]]:
    """Kind, numbers and gradient of all nodes."""
    if layer.table is None:
        kinds = {"weight": "full", "bias": "full", "right": "low", "left": "low"}
        return [(kind, getattr(layer, name).data, getattr(layer, name).grad) for name, kind in kinds.items()]
    parts = []
    for kind, store in layer.table.stores():
        rows, grad = store.take_gradient()
        parts.append((kind, store.data, torch.zeros_like(store.data).index_copy_(0, rows, grad)))
    return parts


def trees_of(forest: TreeLinear, **options: Any) -> list[TreeLinear]:
    """A layer for each tree, with its nodes, its thresholds and the planes of its gates."""
    assert forest.gate is not None
    planes = torch.eye(IN, dtype=torch.float64) if forest.gate.kind == "sign" else forest.gate.weight.detach()
    mean = 0 * forest.gate.running_mean if forest.gate.kind == "sign" else forest.gate.running_mean
    trees = []
    for number in range(forest.num_trees):
        tree = random_tree(DEPTH, sizes=(IN, OUT // forest.num_trees), gate="linear", **options)
        assert tree.gate is not None
        bits = slice(number * DEPTH, (number + 1) * DEPTH)
        with torch.no_grad():
            tree.gate.weight.copy_(planes[bits])
        tree.gate.running_mean.copy_(mean[bits])
        tree.seed.copy_(forest.seed)  # from which `sampled` takes its level
        for (kind, numbers, _), (_, own, _) in zip(nodes_by_kind(forest), nodes_by_kind(tree), strict=True):
            if len(own):
                own.copy_(numbers[rows_of_tree(forest, number, kind)])
        trees.append(tree)
    return trees


GRADIENTS = ["straight_through", "sampled", "magnitude", "flip", "none"]


@pytest.mark.parametrize(
    ("options", "storage", "gate_gradient", "gate"),
    every_pair(FORESTS, ["dense", "lazy"], GRADIENTS, ["linear", "hash", "sign"]),
)
def test_a_forest_is_as_many_layers_of_one_tree(options: dict[str, Any], storage: str, gate_gradient: str, gate: str) -> None:
    """Forward, and the gradients of input, gates and every node."""
    options = options | {"storage": storage, "gate_gradient": gate_gradient}
    forest = make_forest(gate=gate, **options)
    trees = trees_of(forest, **{name: value for name, value in options.items() if name != "num_trees"})
    results = []
    for layers in ([forest], trees):
        x = tokens(12, IN).requires_grad_()
        y = torch.cat([layer(x) for layer in layers], dim=1)
        y.backward(tokens(12, OUT, seed=3))
        results.append((y, x.grad))
    torch.testing.assert_close(results[0], results[1], **EXACT)
    assert forest.gate is not None
    if gate == "linear" and gate_gradient != "none":
        planes_grad = torch.cat([tree.gate.weight.grad for tree in trees if tree.gate is not None])
        torch.testing.assert_close(forest.gate.weight.grad, planes_grad, **EXACT)
        assert planes_grad.any()
    nodes = nodes_by_kind(forest)
    for number, tree in enumerate(trees):
        for (kind, _, grad), (_, _, own_grad) in zip(nodes, nodes_by_kind(tree), strict=True):
            if grad is not None:
                assert own_grad is not None and own_grad.any()
                torch.testing.assert_close(grad[rows_of_tree(forest, number, kind)], own_grad, **EXACT)


@pytest.mark.parametrize("options", FORESTS)
@pytest.mark.parametrize("gate_gradient", ["none", "magnitude"])
def test_gradients_are_finite_differences(gate_gradient: str, options: dict[str, Any]) -> None:
    layer = random_tree(DEPTH, sizes=(2, options["num_trees"]), gate_gradient=gate_gradient, **options).eval()
    x = tokens(3, 2).requires_grad_()
    assert layer.gate is not None and layer.gate(x).abs().min() > 1e-3  # gradcheck moves by 1e-6
    values = {name: value for name, value in layer.named_parameters() if value.numel()}

    def function(x: Tensor, *parts: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(values, parts, strict=True)), (x,))

    # Central differences: third derivatives of size 10 times 1e-6**2, and rounding, 1e-16 / 1e-6.
    assert torch.autograd.gradcheck(function, (x, *values.values()), atol=1e-8, rtol=0)


# ---- nodes and loads -------------------------------------------------------------------------------------------------


def test_every_root_exists_and_other_nodes_with_their_first_gradient() -> None:
    seed_cpu(0)
    layer = TreeLinear(IN, OUT, 40, storage="lazy", full_depth=3, rank=1, num_trees=3)
    assert layer.num_materialized == 3
    x = tokens(5, IN).float()
    layer(x).sum().backward()
    paths = {
        (tree, level, leaf >> (40 - level))
        for leaves in layer.leaf(x).tolist()
        for tree, leaf in enumerate(leaves)
        for level in range(41)
    }
    assert layer.num_materialized == len(paths)


def test_leaf_loads_name_the_tree_above_the_leaf() -> None:
    layer = make_forest(num_trees=3, storage="lazy")
    layer.records_loads = True
    x = tokens(9, IN)
    layer(x).sum().backward()
    leaves = [(tree << DEPTH) + leaf for row in layer.leaf(x).tolist() for tree, leaf in enumerate(row)]
    leaf_G, load_G = layer.take_leaf_loads()
    assert dict(zip(leaf_G.tolist(), load_G.tolist(), strict=True)) == {leaf: leaves.count(leaf) for leaf in leaves}
