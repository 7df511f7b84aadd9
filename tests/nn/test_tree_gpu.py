"""TreeLinear on a GPU: what it computes and learns there is what it does on a CPU, whatever stores its nodes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from distcond.nn import TreeLinear
from distcond.ops import NodeTensors, Schedule
from distcond.ops.batched import batched_backward, batched_forward
from distcond.ops.batched_path import batched_path
from distcond.optim import RowAdam
from tests.trees import random_tree, tokens

pytestmark = pytest.mark.gpu

GATES = [
    ("linear", "straight_through"),
    ("linear", "sampled"),
    ("linear", "magnitude"),
    ("hash", "none"),
    ("sign", "straight_through"),
]
SIZES = [(16, 24), (5, 3)]  # the second one suits no grouped kernel


def gradients(layer: TreeLinear) -> list[Tensor]:
    """Of parameters and of rows, in the order of their keys."""
    found = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    for _, store in layer.table.stores() if layer.table is not None else ():
        rows, grad = store.take_gradient()
        found += [store.keys[rows], grad]
    return found


def step(layer: TreeLinear, x: Tensor) -> list[Tensor]:
    """What a pass computes, and its gradients."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(tokens(len(x), y.shape[1], seed=2).to(y))  # the same for outputs that are rounded otherwise
    assert x.grad is not None
    return [part.detach().cpu().double() for part in (y, x.grad, *gradients(layer))]


def pair(storage: str, sizes: tuple[int, int], **options: Any) -> tuple[TreeLinear, TreeLinear]:
    layer = random_tree(5, sizes=sizes, dtype=torch.float32, storage=storage, full_depth=3, rank=2, **options)
    return layer, copy.deepcopy(layer).to("cuda")


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gate", "gate_gradient"), GATES)
@pytest.mark.parametrize("storage", ["dense", "lazy", "host"])
def test_a_pass_is_that_of_the_cpu(
    storage: str, gate: str, gate_gradient: str, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    here, there = pair(storage, sizes, gate=gate, gate_gradient=gate_gradient)
    x = tokens(300, sizes[0]).to(dtype)
    assert torch.equal(here.leaf(x), there.leaf(x.cuda()).cpu())  # no gate is so near zero that a rounding flips a bit
    for got, wanted in zip(step(there, x.cuda()), step(here, x), strict=True):
        # A sum of up to 300 products of size 1 to 10; bf16: factors and results are rounded by 2**-8 on the GPU alone.
        bound = 1e-5 if dtype == torch.float32 else 2**-6
        assert ((got - wanted).abs() <= bound * wanted.abs().max()).all()


@pytest.mark.parametrize("storage", ["dense", "lazy", "host"])
def test_training_is_that_of_the_cpu(storage: str) -> None:
    layers = pair(storage, (16, 24), gate="hash")
    for layer in layers:
        optimizer = RowAdam(layer, lr=0.01, eps=0.01, weight_decay=0.1)
        for number in range(3):
            layer(tokens(64, 16, seed=number).to(layer.seed.device, torch.float32)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for node in range(63):
        # Three steps of up to 0.01; eps keeps Adam's quotient from hanging on the sign of a gradient near zero.
        torch.testing.assert_close(layers[1].node_weight(node).cpu(), layers[0].node_weight(node), rtol=1e-4, atol=1e-4)


def test_a_step_on_wide_rows_is_that_of_the_cpu() -> None:
    """Rows that the CPU updates one by one."""
    here = TreeLinear(128, 128, 2, storage="lazy", gate="hash")
    there = copy.deepcopy(here).to("cuda")
    for layer in (here, there):
        optimizer = RowAdam(layer, lr=0.01, eps=0.01)
        layer(tokens(64, 128).to(layer.seed.device, torch.float32)).square().sum().backward()
        optimizer.step()
    assert here.table is not None and there.table is not None
    torch.testing.assert_close(there.table.full.data.cpu(), here.table.full.data, rtol=1e-4, atol=1e-4)


def test_rows_on_the_host_take_no_memory_of_the_gpu() -> None:
    with torch.device("cuda"):
        layer = TreeLinear(256, 256, 8, storage="host", gate="hash")
    optimizer = RowAdam(layer)
    layer(torch.randn(4096, 256, device="cuda")).sum().backward()
    optimizer.step()
    assert layer.table is not None and layer.table.full.data.device.type == "cpu"
    assert layer.table.full.size > 100 and {value.device.type for value in layer.table.full.state.values()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_gpu(dtype: torch.dtype) -> None:
    path = batched_path(torch.randint(2**10, (4096,), device="cuda"), 10)
    touched = [len(level.nodes_G) for level in path.levels]
    full, low = sum(touched[:8]), sum(touched[8:])
    shapes = ((full, 64, 64), (full, 64), (low, 2, 64), (low, 3, 64))
    nodes, out = (NodeTensors(*(torch.randn(shape, device="cuda") for shape in shapes)) for _ in range(2))
    rows = [torch.arange(number, device="cuda") for number in touched]
    x, grad = torch.randn(2, 4096, 64, device="cuda", dtype=dtype).unbind()
    batched_forward(x, path, rows, nodes, Schedule.of(path, 7, nodes))  # libraries are loaded, and may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batched_forward(x, path, rows, nodes, Schedule.of(path, 7, nodes))
        batched_backward(x, grad, path, rows, nodes, Schedule.of(path, 7, nodes), range(1, 11), out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
