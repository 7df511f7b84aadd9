"""What a tree layer takes: any layout and precision, the right width, finite numbers or a word about them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distcond.nn import TreeLinear
from distcond.nn.gates import Gate
from tests.pairs import every_pair
from tests.trees import random_tree, tokens

LAYERS = [
    {"storage": storage, "gate": gate, "gate_gradient": gradient}
    for storage in ("dense", "lazy")
    for gate in ("linear", "hash", "sign")
    for gradient in ("straight_through", "sampled", "magnitude", "none")
]
# Each precision with every two of storage, gate and gradient.
HALF = [
    (dtype, {"storage": storage, "gate": gate, "gate_gradient": gradient})
    for dtype in (torch.bfloat16, torch.float16)
    for gradient, gate, storage in every_pair(
        ["straight_through", "sampled", "magnitude", "none"], ["linear", "hash", "sign"], ["dense", "lazy"]
    )
]
SHAPE: dict[str, Any] = {"full_depth": 2, "rank": 2, "dtype": torch.float32}


def passed(layer: TreeLinear, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of x."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, torch.autograd.grad(y, x, grad.to(y.dtype))[0]


@pytest.mark.parametrize("options", LAYERS, ids=lambda options: "-".join(options.values()))
def test_every_layer_takes_an_empty_batch_and_any_layout(options: dict[str, str]) -> None:
    layer = random_tree(4, **SHAPE, **options).eval()
    x, grad = tokens(24).float().view(4, 6, 5), tokens(24, 4, seed=2).float().view(4, 6, 4)
    expected = passed(layer, x, grad)
    for strange in (x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 1]):
        assert not strange.is_contiguous()
        for got, wanted in zip(passed(layer, strange, grad), expected, strict=True):
            assert torch.equal(got, wanted)
    layer.train()
    for shape in [(0,), (3, 0)]:
        y, grad_x = passed(layer, x.new_empty(*shape, 5), x.new_empty(*shape, 4))
        assert y.shape == (*shape, 4) and grad_x.shape == (*shape, 5)


@pytest.mark.parametrize(("dtype", "options"), HALF)
def test_half_precision_input_of_float32_nodes_is_rounded_once(options: dict[str, str], dtype: torch.dtype) -> None:
    layer = random_tree(4, **SHAPE, **options).eval()
    half, grad = tokens(24).to(dtype), tokens(24, 4, seed=2).to(dtype)
    (y, grad_x), (y_full, grad_full) = passed(layer, half, grad), passed(layer, half.float(), grad.float())
    assert y.dtype == grad_x.dtype == dtype and torch.equal(y, y_full.to(dtype))
    # The gradients through matrices and gates are rounded, then their sum: numbers about as large as the largest.
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(grad_x.float(), grad_full, rtol=0, atol=3 * rounding * float(grad_full.abs().max()))


@pytest.mark.parametrize(("dtype", "options"), HALF)
def test_a_half_precision_layer_computes_what_its_rounded_weights_say(options: dict[str, str], dtype: torch.dtype) -> None:
    layer = random_tree(4, **SHAPE, **options).to(dtype).eval()
    x, grad = tokens(24).to(dtype), tokens(24, 4, seed=2).to(dtype)
    y, grad_x = passed(layer, x, grad)
    leaves = layer.leaf(x)
    assert layer.gate is not None and layer.gate.running_mean.dtype == torch.float32
    y_full, grad_full = passed(layer.float(), x.float(), grad.float())
    assert y.dtype == dtype and torch.equal(leaves, layer.leaf(x.float()))
    # Dense nodes are added in half precision, lazy ones in float32: 5 levels, forward and backward, each rounded once, and
    # their weights once more where levels are merged; numbers about as large as the largest.
    for got, wanted in ((y, y_full), (grad_x, grad_full)):
        atol = 10 * torch.finfo(dtype).eps / 2 * float(wanted.detach().abs().max())
        torch.testing.assert_close(got.float(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(), (4,), (10,), (3, 10), (5, 3), (0, 4)])
def test_another_last_dimension_is_refused_by_all_that_take_inputs(shape: tuple[int, ...]) -> None:
    layer = random_tree(3)
    for takes in (layer, layer.codes, layer.leaf):
        with pytest.raises(ValueError, match=r".") as refused:
            takes(torch.zeros(shape, dtype=torch.float64))
        assert str(refused.value) == f"input of shape {shape}: its last dimension must be in_features=5"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_numbers_that_are_not_floating_point_are_refused_by_all_that_take_inputs(storage: str, dtype: torch.dtype) -> None:
    layer = random_tree(3, storage=storage)
    for takes in (layer, layer.codes, layer.leaf):
        with pytest.raises(ValueError, match=r".") as refused:
            takes(torch.ones(2, 5, dtype=dtype))
        assert str(refused.value).startswith(f"input of {dtype}: ") and "floating-point" in str(refused.value)


@pytest.mark.parametrize(
    ("bad", "gate", "storage"), every_pair([math.nan, math.inf, -math.inf], ["linear", "hash", "sign"], ["dense", "lazy"])
)
def test_rows_without_a_leaf_are_counted_in_every_pass_and_once(storage: str, gate: str, bad: float) -> None:
    layer = random_tree(3, storage=storage, gate=gate)
    x = tokens(10)
    layer(x)
    assert layer.take_nonfinite() == 0
    x[2, 1], x[2, 2], x[7, 0] = bad, -bad, bad
    layer(x.requires_grad_()).sum().backward()
    layer.eval()(x)
    with torch.no_grad():
        layer(x)
    layer.codes(x), layer.leaf(x)
    assert layer.take_nonfinite() == 6
    checkpoint(layer.train(), x, use_reentrant=False).sum().backward()
    assert layer.take_nonfinite() == 2 and layer.take_nonfinite() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_anomaly_mode_refuses_such_rows_wherever_the_number_stands(bad: float) -> None:
    layer = random_tree(3, gate="sign")
    x = tokens(10)
    x[4, 4] = x[6, 0] = bad
    layer(x)
    with torch.autograd.set_detect_anomaly(True):
        layer(tokens(10)), layer(tokens(0))
        for takes in (layer, layer.codes, layer.leaf):
            with pytest.raises(ValueError, match="input has 2 of 10 rows with NaN or infinite numbers, the first is row 4"):
                takes(x)


def test_a_step_with_gates_that_are_not_finite_leaves_the_thresholds_alone() -> None:
    gate, x = Gate(5, 3, "linear").double(), tokens(20)
    x[3, 2] = math.nan
    gate.stage(gate.statistics(gate(x)))
    gate.commit(gate.take_statistics())
    assert not gate.running_mean.any() and int(gate.num_commits) == 0
