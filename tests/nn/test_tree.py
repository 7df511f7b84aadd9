"""TreeLinear's function: one matrix per leaf, whatever the storage; depth 0 is nn.Linear; lazy nodes follow the visits."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from distcond.nn import TreeLinear
from distcond.optim import RowAdam
from tests.pairs import every_pair
from tests.trees import nodes_of, path, random_tree, seed_cpu, token_by_token, tokens

STORAGES = ["dense", "lazy"]
# float64: sums of at most 13 levels x 5 products of numbers of size 1. float32: the same sums, with 65 roundings of at
# most 6e-8 of partial sums below 20.
TOLERANCE = {torch.float64: {"rtol": 0, "atol": 1e-13}, torch.float32: {"rtol": 0, "atol": 5e-5}}
SHAPES: list[dict[str, Any]] = [{}, {"bias": False}, {"full_depth": 0, "rank": 2}, {"full_depth": 1, "rank": 1, "bias": False}]


def shape(options: dict[str, Any], depth: int) -> dict[str, Any]:
    """Options for a tree of this depth: a full depth beyond it is cut."""
    return options | ({"full_depth": min(options["full_depth"], depth)} if "full_depth" in options else {})


# ---- one matrix per leaf ---------------------------------------------------------------------------------------------


GATES = [*(("linear", depth) for depth in (0, 1, 2, 3, 7, 12)), ("hash", 0), ("hash", 12), ("sign", 0), ("sign", 5)]


@pytest.mark.parametrize(("kind", "options", "storage"), every_pair(GATES, SHAPES, STORAGES))
def test_output_is_the_effective_weight_of_the_leaf_times_x(kind: tuple[str, int], storage: str, options: dict[str, Any]) -> None:
    gate, depth = kind
    layer = random_tree(depth, storage=storage, gate=gate, **shape(options, depth))
    x = tokens(9)
    torch.testing.assert_close(layer(x), token_by_token(layer, x), **TOLERANCE[torch.float64])


@pytest.mark.parametrize(("options", "depth", "storage"), every_pair(SHAPES, [0, 3, 12], STORAGES))
def test_float32_differs_by_its_roundings_alone(storage: str, depth: int, options: dict[str, Any]) -> None:
    layer = random_tree(depth, storage=storage, dtype=torch.float32, **shape(options, depth))
    x = tokens(9).float()
    torch.testing.assert_close(layer(x), token_by_token(layer, x), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("storage", STORAGES)
def test_effective_weight_is_the_sum_of_the_nodes_on_the_path(storage: str, options: dict[str, Any]) -> None:
    layer = random_tree(4, storage=storage, **options)
    _, biases = nodes_of(layer)
    for leaf in range(16):
        weight, bias = layer.effective_weight(leaf)
        expected = sum(layer.node_weight(node) for node in path(leaf, 4))
        torch.testing.assert_close(weight, expected, **TOLERANCE[torch.float64])
        torch.testing.assert_close(bias, biases[path(leaf, 4)].sum(0), **TOLERANCE[torch.float64])
        assert bias.any() == options.get("bias", True)


@pytest.mark.parametrize("options", SHAPES)
def test_a_dense_node_is_its_row_of_the_parameters(options: dict[str, Any]) -> None:
    layer = random_tree(3, **options)
    num_full = 2 ** (layer.full_depth + 1) - 1
    with torch.no_grad():
        factors = [left[: layer.rank].T @ right for left, right in zip(layer.left, layer.right, strict=True)]
    expected = [*layer.weight.detach(), *factors]
    assert len(expected) == 15 and len(layer.weight) == num_full
    for node in range(15):
        torch.testing.assert_close(layer.node_weight(node), expected[node], **TOLERANCE[torch.float64])


@pytest.mark.parametrize("depth", [0, 1, 5, 62])
def test_leaf_is_the_integer_of_the_bits_the_first_one_most_significant(depth: int) -> None:
    seed_cpu(0)
    layer = TreeLinear(5, 4, depth, storage="lazy")
    x = tokens(50).float().view(2, 25, 5)
    codes, leaf = layer.codes(x), layer.leaf(x)
    assert codes.shape == (2, 25, 1, depth) and codes.dtype == torch.bool
    assert leaf.shape == (2, 25, 1) and leaf.dtype == torch.int64
    for bits, number in zip(codes.view(50, depth).tolist(), leaf.flatten().tolist(), strict=True):
        assert number == int("0" + "".join(str(int(bit)) for bit in bits), 2)


def test_bits_are_the_signs_of_the_centred_gates() -> None:
    layer = random_tree(4)
    assert layer.gate is not None
    x = tokens(40)
    raw = x @ layer.gate.weight.T.detach()
    assert torch.equal(layer.codes(x)[:, 0], raw > layer.gate.running_mean)


@pytest.mark.parametrize("storage", STORAGES)
def test_sign_bits_are_those_of_the_first_inputs(storage: str) -> None:
    layer = random_tree(4, gate="sign", storage=storage)
    x = tokens(40)
    layer(x).sum().backward()
    layer.commit_statistics()
    assert torch.equal(layer.codes(x)[:, 0], x[:, :4] > 0)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bit", range(3))
def test_a_bit_chooses_between_the_two_children_of_its_prefix(bit: int, storage: str) -> None:
    """Tokens that differ in one bit share exactly the nodes above it."""
    layer = random_tree(3, sizes=(3, 4), storage=storage)
    matrices, biases = nodes_of(layer)
    assert layer.gate is not None
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(3))
        layer.gate.running_mean.zero_()
    x = torch.ones(2, 3, dtype=torch.float64)
    x[1, bit] = -1.0
    leaves = layer.leaf(x)[:, 0].tolist()
    assert leaves == [7, 7 - 2 ** (2 - bit)]
    shared = [a == b for a, b in zip(path(leaves[0], 3), path(leaves[1], 3), strict=True)]
    assert shared == [level <= bit for level in range(4)]
    for token, leaf, y in zip(x, leaves, layer(x), strict=True):
        nodes = path(leaf, 3)
        expected = matrices[nodes].sum(0) @ token + biases[nodes].sum(0)
        torch.testing.assert_close(y, expected, **TOLERANCE[torch.float64])


# ---- any number and shape of tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leading", "options", "storage"), every_pair([(), (0,), (1,), (2, 3), (2, 0, 3), (1, 2, 1, 3)], SHAPES, STORAGES)
)
def test_leading_dimensions_are_kept_forward_and_backward(
    leading: tuple[int, ...], storage: str, options: dict[str, Any]
) -> None:
    layer = random_tree(3, storage=storage, **options)
    count = int(torch.tensor(leading).prod())
    x = tokens(count).view(*leading, 5).requires_grad_()
    y = layer(x)
    assert y.shape == (*leading, 4)
    torch.testing.assert_close(y.view(-1, 4), token_by_token(layer, x.detach().view(-1, 5)), **TOLERANCE[torch.float64])
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and bool(x.grad.isfinite().all())
    if count == 0:
        assert all(not parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("storage", STORAGES)
def test_all_tokens_in_one_leaf(storage: str) -> None:
    layer = random_tree(5, storage=storage, full_depth=2, rank=2)
    x = tokens(1).repeat(30, 1) * torch.linspace(1.0, 1.001, 30, dtype=torch.float64)[:, None]
    leaves = layer.leaf(x)
    assert len(leaves.unique()) == 1
    weight, bias = layer.effective_weight(int(leaves[0, 0]))
    torch.testing.assert_close(layer(x), x @ weight.T + bias, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("storage", STORAGES)
def test_non_contiguous_input_and_gradient_give_what_contiguous_ones_give(storage: str) -> None:
    layer = random_tree(3, storage=storage, full_depth=1, rank=2)
    results = []
    for view in (lambda t: t, lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, t], -1)[..., 0]):
        fresh = copy.deepcopy(layer)
        x = view(tokens(12).view(3, 4, 5)).requires_grad_()
        y = fresh(x)
        (grad_x,) = torch.autograd.grad(y, x, view(tokens(12, 4, seed=5).view(3, 4, 4)))
        results.append((y, grad_x))
    for y, grad_x in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(grad_x, results[0][1])
    x = tokens(1).expand(6, 5)
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("gate_gradient", ["straight_through", "magnitude"])
def test_a_lazy_layer_computes_half_precision_input_in_float32_and_rounds_once(gate_gradient: str) -> None:
    layer = random_tree(4, storage="lazy", full_depth=2, rank=2, dtype=torch.float32, gate_gradient=gate_gradient)
    half = tokens(20).bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    y_half, y_full = layer(half), layer(full)
    assert y_half.dtype == torch.bfloat16 and torch.equal(y_half, y_full.bfloat16())
    grad = tokens(20, 4, seed=3).bfloat16()
    (grad_half,) = torch.autograd.grad(y_half, half, grad)
    (grad_full,) = torch.autograd.grad(y_full, full, grad.float())
    # Two roundings to bf16 (2**-9 each): the gradient through the matrices and the one through the gates.
    torch.testing.assert_close(grad_half.float(), grad_full, rtol=2**-8, atol=2**-7)


@pytest.mark.parametrize("storage", STORAGES)
def test_autocast_leaves_bits_and_rows_in_float32(storage: str) -> None:
    layer = random_tree(4, storage=storage, full_depth=2, rank=2, dtype=torch.float32).eval()
    x = tokens(200).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, leaf = layer(x), layer.leaf(x)
        (grad_x,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(leaf, layer.leaf(x))
    # A dense layer may round its products: 2**-8 of sums whose terms are below 10.
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=10 * 2**-8)
    torch.testing.assert_close(grad_x, torch.autograd.grad(layer(x).sum(), x)[0], rtol=0, atol=40 * 2**-8)


# ---- nn.Linear -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leading", "dtype", "bias", "storage"),
    every_pair([(5,), (1, 5), (33, 5), (2, 7, 5), (0, 5)], [torch.float32, torch.float64], [True, False], STORAGES),
)
def test_depth_0_is_nn_linear_bit_for_bit(storage: str, bias: bool, leading: tuple[int, ...], dtype: torch.dtype) -> None:
    seed_cpu(0)
    linear = nn.Linear(5, 4, bias=bias)
    seed_cpu(0)
    layer = TreeLinear(5, 4, 0, storage=storage, bias=bias)
    linear, layer = linear.to(dtype), layer.to(dtype)
    x = torch.randn(leading, dtype=dtype)
    grad = torch.randn(*leading[:-1], 4, dtype=dtype)
    results = []
    for module in (linear, layer):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(grad)
        results.append((y, leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    weight, row = linear.weight.grad, 0
    if layer.table is None:
        assert torch.equal(layer.weight.grad[row], weight)
        assert not bias or torch.equal(layer.bias.grad[row], linear.bias.grad)
    else:
        _, rows = layer.table.full.take_gradient()
        flat = torch.cat([weight.flatten(), linear.bias.grad]) if bias else weight.flatten()
        assert torch.equal(rows, flat[None]) or (leading[0] == 0 and not weight.any())


@pytest.mark.parametrize(("options", "depth", "storage"), every_pair(SHAPES, [0, 1, 6], STORAGES))
def test_from_linear_computes_the_same_function(storage: str, depth: int, options: dict[str, Any]) -> None:
    seed_cpu(0)
    linear = nn.Linear(5, 4, bias=options.get("bias", True))
    others = {name: value for name, value in shape(options, depth).items() if name != "bias"}
    layer = TreeLinear.from_linear(linear, depth, storage=storage, **others)
    assert layer.depth == depth and layer.storage == storage
    for leading in [(5,), (33, 5), (2, 7, 5), (0, 5)]:
        x = torch.randn(leading)
        # The tokens of a leaf are a product of their own, which BLAS may add up in another order: 5 products below 4.
        torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=2e-6 if depth else 0.0)


@pytest.mark.parametrize(
    ("storage", "dtype", "rounding"),
    [("dense", torch.float64, 1e-16), ("lazy", torch.float64, 1e-16), ("dense", torch.bfloat16, 4e-3)],
)
def test_from_linear_keeps_the_precision_of_the_linear_layer(storage: str, dtype: torch.dtype, rounding: float) -> None:
    seed_cpu(0)
    linear = nn.Linear(5, 4).to(dtype)
    x = torch.randn(33, 5, dtype=dtype)
    y = TreeLinear.from_linear(linear, 3, storage=storage)(x)
    torch.testing.assert_close(y, linear(x), rtol=2 * rounding, atol=10 * rounding)


@pytest.mark.parametrize("storage", STORAGES)
def test_from_linear_copies(storage: str) -> None:
    linear = nn.Linear(5, 4)
    layer, x = TreeLinear.from_linear(linear, 2, storage=storage), tokens(7).float()
    before = layer(x)
    with torch.no_grad():
        linear.weight.add_(1.0)
    assert torch.equal(layer(x), before)


# ---- lazy nodes ------------------------------------------------------------------------------------------------------


def visited(layer: TreeLinear, x: torch.Tensor) -> set[int]:
    return {node for leaf in layer.leaf(x).flatten().tolist() for node in path(leaf, layer.depth)}


def materialised(layer: TreeLinear) -> list[int]:
    assert layer.table is not None
    return [key for _, store in layer.table.stores() for key in store.keys.tolist()]


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("depth", [0, 6, 62])
def test_exactly_the_paths_that_backward_took_exist(depth: int, options: dict[str, Any]) -> None:
    seed_cpu(0)
    layer = TreeLinear(5, 4, depth, storage="lazy", **shape(options, depth))
    optimizer = RowAdam(layer, lr=0.1)
    expected = {0}
    for step in range(3):
        x = tokens(10, seed=step).float()
        layer(x)  # no gradient, no node
        assert layer.num_materialized == len(expected)
        expected |= visited(layer, x)
        layer(x).square().sum().backward()
        optimizer.step()
        assert layer.num_materialized == len(expected)
        assert sorted(materialised(layer)) == sorted(expected)
    layer, x = layer.double(), x.double()
    # 63 levels x 5 products, each rounded by at most 1.1e-16 of partial sums below 40
    torch.testing.assert_close(layer(x), token_by_token(layer, x), rtol=0, atol=2e-12)


def test_memory_follows_the_visits_in_a_tree_of_depth_62() -> None:
    seed_cpu(0)
    layer = TreeLinear(5, 4, 62, storage="lazy", full_depth=2, rank=1)
    assert layer.table is not None
    layer(tokens(10).float()).sum().backward()
    for _, store in layer.table.stores():
        held = len(store.data.untyped_storage()) / (4 * store.width)
        assert held <= 2 * store.size <= 2 * (7 + 10 * 60)


@pytest.mark.parametrize("options", SHAPES)
def test_an_unseen_leaf_equals_its_deepest_materialised_prefix(options: dict[str, Any]) -> None:
    seed_cpu(0)
    layer = TreeLinear(5, 4, 6, storage="lazy", **options)
    optimizer = RowAdam(layer, lr=0.1)
    for step in range(3):
        layer(tokens(2, seed=step).float()).square().sum().backward()
        optimizer.step()
    exist = set(materialised(layer))
    x = tokens(50, seed=9).float()
    lengths = set()
    for token, leaf, y in zip(x, layer.leaf(x)[:, 0].tolist(), layer(x), strict=True):
        prefix = [node for node in path(leaf, 6) if node in exist]
        assert prefix == path(leaf, 6)[: len(prefix)]  # existing nodes reach down from the root without a gap
        lengths.add(len(prefix))
        weight, bias = (sum(layer._node(node)[part] for node in prefix) for part in (0, 1))
        torch.testing.assert_close(layer.effective_weight(leaf), (weight, bias), **TOLERANCE[torch.float32])
        torch.testing.assert_close(y, weight @ token + bias, **TOLERANCE[torch.float32])
    assert len(lengths) > 2 and 7 in lengths  # both strangers and acquaintances were met


def test_a_node_that_does_not_exist_is_a_node_of_zeros() -> None:
    seed_cpu(0)
    layer = TreeLinear(5, 4, 40, storage="lazy", full_depth=3, rank=2)
    for node in (1, 14, 15, 2**41 - 2):
        assert layer.node_weight(node).shape == (4, 5) and not layer.node_weight(node).any()
    root = layer.node_weight(0)
    weight, _ = layer.effective_weight(2**40 - 1)
    assert torch.equal(weight, root)


def test_a_lazy_layer_whose_input_asks_for_no_gradient_still_trains() -> None:
    seed_cpu(0)
    model = nn.Sequential(TreeLinear(5, 16, 3, storage="lazy"), nn.Tanh(), nn.Linear(16, 1))
    rows, dense = RowAdam(model, lr=0.02), torch.optim.Adam(model.parameters(), lr=0.02)
    x, losses = tokens(64).float(), []
    target = (x[:, :1] * x[:, 1:2]).sign()
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        loss.backward()
        gate_grad = model[0].gate.weight.grad
        assert gate_grad is not None
        rows.step(), dense.step()
        rows.zero_grad(), dense.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert gate_grad.any()


@pytest.mark.parametrize("storage", STORAGES)
def test_forward_without_gradient_changes_nothing(storage: str) -> None:
    seed_cpu(0)
    layer = TreeLinear(5, 4, 3, storage=storage)
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer(tokens(20).float())
    layer.eval()(tokens(20).float())
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ---- hash gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_hash_planes_come_from_the_seed_and_never_change(storage: str) -> None:
    def make(seed: int) -> TreeLinear:
        seed_cpu(seed)
        return TreeLinear(5, 4, 4, gate="hash", storage=storage)

    layer, same, other = make(3), make(3), make(4)
    x = tokens(100).float()
    assert torch.equal(layer.codes(x), same.codes(x)) and not torch.equal(layer.codes(x), other.codes(x))
    assert not [name for name, _ in layer.named_parameters() if name.startswith("gate.")]
    planes = layer.gate.weight.clone()
    optimizer = RowAdam(layer, lr=0.1)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.gate.weight, planes) and layer.gate.weight.grad is None


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "given", "needed"),
    [
        ({"depth": -1}, "depth=-1", "0..62"),
        ({"depth": 63, "storage": "lazy"}, "depth=63", "0..62"),
        ({"depth": 21, "storage": "dense"}, "depth=21", "storage='lazy'"),
        ({"in_features": 0}, "in_features=0", "1 or more"),
        ({"out_features": -2}, "out_features=-2", "1 or more"),
        ({"full_depth": 4}, "full_depth=4", "0..3"),
        ({"full_depth": -1}, "full_depth=-1", "0..3"),
        ({"min_visits": 0, "storage": "lazy"}, "min_visits=0", "1 or more"),
        ({"max_nodes": 0, "storage": "lazy"}, "max_nodes=0", "root"),
        ({"min_visits": 2}, "min_visits=2", "use storage='lazy'"),
        ({"max_nodes": 9}, "max_nodes=9", "use storage='lazy'"),
        ({"full_depth": 1}, "rank=None", "1 or more"),
        ({"full_depth": 1, "rank": 0}, "rank=0", "1 or more"),
        ({"gate": "sigmoid"}, "gate='sigmoid'", "'linear', 'hash', 'sign'"),
        ({"gate": "sign", "depth": 6}, "6 bits", "5"),
        ({"gate_gradient": "reinforce"}, "gate_gradient='reinforce'", "straight_through"),
        ({"storage": "sparse"}, "storage='sparse'", "lazy"),
        ({"num_trees": 3}, "num_trees=3", "2 or 4"),
        ({"num_trees": 0}, "num_trees=0", "use 1"),
        ({"num_trees": 9}, "num_trees=9", "use 4"),
        ({"num_trees": 4, "depth": 61, "storage": "lazy"}, "num_trees=4 trees of depth=61", "smaller depth"),
        ({"num_trees": 2, "gate": "sign"}, "6 bits", "5"),
    ],
)
def test_options_out_of_range_are_refused_with_what_was_given_and_what_is_needed(
    options: dict[str, Any], given: str, needed: str
) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        TreeLinear(**({"in_features": 5, "out_features": 4, "depth": 3} | options))
    assert given in str(refused.value) and needed in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("counts", [[7, 0, 5], [0], []])
def test_leaf_loads_are_the_tokens_of_backward_passes(counts: list[int]) -> None:
    """A rank to which nobody sends a token takes part without any."""
    layer = random_tree(3, storage="lazy")
    layer.records_loads = True
    batches = [tokens(count, seed=count) for count in counts]
    for x in batches:
        layer(x)  # no backward pass
        layer(x).sum().backward()
    leaves = [leaf for x in batches for leaf in layer.leaf(x).flatten().tolist()]
    leaf_G, load_G = layer.take_leaf_loads()
    assert dict(zip(leaf_G.tolist(), load_G.tolist(), strict=True)) == {leaf: leaves.count(leaf) for leaf in leaves}
    assert layer.take_leaf_loads()[0].tolist() == []
