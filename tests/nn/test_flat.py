"""A flattened tree is its layer in evaluation: the same bits, one matrix for the whole path."""

import copy
import pickle
from typing import Any

import pytest
import torch

from distcond.nn import FlatTree, TreeLinear, flatten
from distcond.optim import RowAdam
from distcond.table import Collective, SubtreePlan
from tests.trees import random_tree, seed_cpu, token_by_token, tokens

# float64: sums of at most 13 levels x 5 products of numbers of size 1.
ROUNDING = {"rtol": 0, "atol": 1e-13}
SHAPES: list[dict[str, Any]] = [{}, {"bias": False}, {"full_depth": 1, "rank": 2}, {"full_depth": 0, "rank": 1, "bias": False}]


def loads_of(layer: TreeLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.unique(layer.leaf(x), return_counts=True)


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("gate", ["linear", "hash", "sign"])
@pytest.mark.parametrize("storage", ["dense", "lazy"])
@pytest.mark.parametrize("trees", [1, 2])
def test_a_flattened_tree_is_its_layer(trees: int, storage: str, gate: str, options: dict[str, Any]) -> None:
    # 5 inputs give the sign gates of two trees two bits each.
    layer = random_tree(4 // trees, storage=storage, gate=gate, num_trees=trees, **options).eval()
    flat, x = flatten(layer), tokens(60)
    assert flat.rest is None and flat.weight.shape == (trees * 2 ** (4 // trees), 5, 4 // trees)
    for part in (x.view(3, 4, 5, 5), x[:1], x[7], x[:0]):
        torch.testing.assert_close(flat(part), layer(part), **ROUNDING)


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_depth_0_is_one_matrix(storage: str) -> None:
    layer, x = random_tree(0, storage=storage), tokens(9)
    flat = flatten(layer)
    assert flat.weight.shape == (1, 5, 4)
    torch.testing.assert_close(flat(x), layer(x), **ROUNDING)
    torch.testing.assert_close(flat(x[:1]), layer(x[:1]), **ROUNDING)


@pytest.mark.parametrize("max_leaves", [1, 3])
@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_the_hottest_leaves_are_folded_and_the_layer_serves_the_rest(storage: str, max_leaves: int) -> None:
    layer = random_tree(4, storage=storage, full_depth=2, rank=1).eval()
    x = tokens(200)
    leaf_G, count_G = loads_of(layer, x)
    flat = flatten(layer, max_leaves, (leaf_G, count_G))
    busiest = sorted(count_G.tolist())[-max_leaves:]
    assert sorted(count_G[torch.isin(leaf_G, flat.leaf)].tolist()) == busiest and len(flat.weight) == max_leaves
    served: list[int] = []
    layer.register_forward_pre_hook(lambda _, inputs: served.append(len(inputs[0])))
    y = flat(x)
    assert served == [200 - sum(busiest)]
    torch.testing.assert_close(y, token_by_token(layer, x), **ROUNDING)
    for token in x[:40, None]:
        torch.testing.assert_close(flat(token), token_by_token(layer, token), **ROUNDING)


@pytest.mark.parametrize("max_leaves", [1, 5, 13])
@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_trees_share_the_leaves_that_may_be_folded(storage: str, max_leaves: int) -> None:
    layer = random_tree(3, sizes=(5, 6), storage=storage, full_depth=1, rank=1, num_trees=3).eval()
    assert layer.gate is not None
    layer.gate.running_mean[3:6] -= 1.0  # the middle tree's tokens crowd on few leaves, which are the hottest
    x = tokens(300)
    loads = torch.unique(layer.leaf(x) + torch.tensor([0, 8, 16]), return_counts=True)
    flat = flatten(layer, max_leaves, loads)
    busiest = sorted(loads[1].tolist())[-max_leaves:]
    assert sorted(loads[1][torch.isin(loads[0], flat.leaf)].tolist()) == busiest and len(flat.weight) == max_leaves
    assert max_leaves > 1 or 8 <= int(flat.leaf) < 16
    assert max_leaves < 13 or len((flat.leaf // 8).unique()) == 3
    torch.testing.assert_close(flat(x), token_by_token(layer, x), **ROUNDING)
    for token in x[:40, None]:
        torch.testing.assert_close(flat(token), token_by_token(layer, token), **ROUNDING)


@pytest.mark.parametrize("trees", [1, 2])
def test_a_deep_lazy_tree_is_folded_where_tokens_went(trees: int) -> None:
    seed_cpu(0)
    layer = TreeLinear(5, 4, 40, full_depth=2, rank=1, storage="lazy", num_trees=trees).double()
    layer.records_loads, optimizer = True, RowAdam(layer, lr=0.1)
    for step in range(2):
        layer(tokens(20, seed=step)).square().sum().backward()
        optimizer.step()
    layer.eval()
    x, strangers = tokens(20, seed=1), tokens(20, seed=5)
    flat = flatten(layer, loads=layer.take_leaf_loads())
    assert 10 < len(flat.leaf) < 2**40
    torch.testing.assert_close(flat(x), layer(x), **ROUNDING)
    torch.testing.assert_close(flat(strangers), layer(strangers), **ROUNDING)


@pytest.mark.parametrize("count", [1, 20])
def test_no_gradient_comes_back_and_autocast_changes_nothing(count: int) -> None:
    layer = random_tree(3, dtype=torch.float32)
    x = tokens(count).float().requires_grad_()
    for flat in (flatten(layer), flatten(layer, 1, loads_of(layer, tokens(50).float()))):
        y = flat(x)
        assert not y.requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(flat(x), y)
        half = flat(x.bfloat16())
        # The layer computes in float32 from numbers rounded to bf16, and rounds once.
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half, layer.eval()(x.bfloat16()), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_flattened_tree_in_half_precision_keeps_its_leaves(dtype: torch.dtype) -> None:
    layer, x = random_tree(4, dtype=torch.float32), tokens(1000).float()
    layer.eval()
    near = layer.gates(x).abs().amin(dim=(1, 2)) < 0.01  # whose bits a rounding of planes or thresholds flips
    assert near.sum() > 20
    x = x[near].to(dtype)
    flat = flatten(layer).to(dtype)
    assert flat.weight.dtype == dtype and flat.planes.dtype == flat.thresholds.dtype == torch.float32
    # Weights and outputs, numbers of size 1, are rounded once each.
    torch.testing.assert_close(flat(x), layer(x), rtol=0, atol=10 * torch.finfo(dtype).eps)
    torch.testing.assert_close(torch.cat([flat(one) for one in x.split(1)]), flat(x), rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert flat.double().planes.dtype == torch.float64


def test_a_flattened_tree_is_saved_and_loaded_like_any_module() -> None:
    layer, x = random_tree(3), tokens(9)
    flat, other = flatten(layer), flatten(random_tree(3, seed=1))
    assert not torch.equal(other(x), flat(x)) and not torch.equal(other(x[:1]), flat(x[:1]))
    other.load_state_dict(flat.state_dict())
    assert torch.equal(other(x), flat(x)) and torch.equal(other(x[:1]), flat(x[:1]))
    twin = copy.deepcopy(other)
    twin.load_state_dict({name: torch.zeros_like(value) for name, value in flat.state_dict().items()})
    assert not twin(x[:1]).any() and torch.equal(other(x[:1]), flat(x[:1]))
    assert other.float()(x[:1]).dtype == torch.float64 and not torch.equal(other(x[:1]), flat(x[:1]))
    assert torch.equal(pickle.loads(pickle.dumps(flat))(x[:1]), flat(x[:1]))


def test_what_cannot_be_flattened_is_refused() -> None:
    layer = TreeLinear(5, 4, 40, storage="lazy")
    with pytest.raises(ValueError, match="a leaf has no matrix of its own"):
        flatten(random_tree(3, gate_gradient="magnitude"))
    with pytest.raises(ValueError, match=r"of 2 x 2\*\*3 leaves at most 15 are folded; give loads"):
        flatten(random_tree(3, num_trees=2), 15)
    with pytest.raises(ValueError, match=r"of 2\*\*40 leaves at most 100 are folded; give loads"):
        flatten(layer, 100)
    with pytest.raises(ValueError, match="max_leaves=0 is below 1"):
        flatten(layer, 0)
    layer.shard(SubtreePlan.make(40, 2), Collective())
    with pytest.raises(ValueError, match="this rank holds a part of the nodes only"):
        flatten(layer)
    assert isinstance(flatten(random_tree(0, gate_gradient="magnitude")), FlatTree)  # no level to scale


def test_another_last_dimension_and_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="its last dimension must be in_features=5"):
        flatten(random_tree(3))(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"input of torch\.int64"):
        flatten(random_tree(3))(torch.zeros(3, 5, dtype=torch.int64))
