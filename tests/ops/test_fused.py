"""The kernels of GPUs: on a GPU as they are, elsewhere through Triton's interpreter; against the loop over single tokens."""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from distcond.ops import NodeTensors, PerLevel, fused
from distcond.ops.batched_path import batched_path
from distcond.ops.fused import fused_backward, fused_forward
from tests.ops.test_batched import random_like, unwritten, wanted_gradients
from tests.ops.test_tree_matmul import Case, assert_rows_hold, make_case, naive

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32, or three tf32 products on a GPU: sums of at most 60 products of numbers of size 1 to 10.
NEAR = {"rtol": 1e-4, "atol": 1e-4}

CASES: list[tuple[int, int, dict[str, Any]]] = [
    (0, 0, {"tokens": 1}),
    (3, 3, {"tokens": 20}),
    (3, 1, {"tokens": 5, "sizes": (17, 9, 3)}),
    (2, 1, {"tokens": 3, "bias": 0}),
    (2, 1, {"tokens": 3, "trees": 2, "sizes": (20, 70, 1)}),
]


def on_device(case: Case) -> tuple[Any, ...]:
    """x, path, rows and nodes in fp32, as the kernels take them."""
    depth = len(case.path.levels) - 1
    path = batched_path(case.leaf.to(DEVICE), depth, case.trees)
    rows = PerLevel.of([rows_G.to(DEVICE) for rows_G in case.rows])
    nodes = NodeTensors(*(tensor.to(DEVICE, torch.float32) for tensor in case.nodes))
    return case.x.to(DEVICE, torch.float32), path, rows, nodes


@pytest.mark.parametrize(("depth", "full_depth", "details"), CASES)
def test_forward_is_the_sum_along_each_tokens_path(depth: int, full_depth: int, details: dict[str, Any]) -> None:
    case = make_case(depth, full_depth, missing=0.5, **details)
    expected = naive(case, case.nodes, case.x, torch.ones(len(case.leaf), depth, dtype=torch.float64))
    y = fused_forward(*on_device(case), full_depth)
    torch.testing.assert_close(y.cpu().double(), expected, **NEAR)


@pytest.mark.parametrize(("depth", "full_depth", "details"), CASES)
def test_backward_is_the_gradient_of_the_sum(depth: int, full_depth: int, details: dict[str, Any]) -> None:
    case = make_case(depth, full_depth, **details)
    grad_y = random_like(case.x, len(case.leaf), case.nodes.bias_SP.shape[1])
    wanted = wanted_gradients(case, torch.ones(len(case.leaf), depth, dtype=torch.float64), grad_y)
    x, path, rows, nodes = on_device(case)
    for gate_levels in (range(1, depth + 1), range(depth, 0, -2))[: 1 + (depth == 2 and case.trees == 1)]:
        out = unwritten(nodes)
        got = fused_backward(x, grad_y.to(DEVICE, torch.float32), path, rows, nodes, full_depth, gate_levels, out)
        grad_x, change = (part.cpu().double() for part in got)
        torch.testing.assert_close(grad_x.unflatten(0, (-1, case.trees)).sum(1), wanted[0], **NEAR)
        mask = torch.tensor([float(level in gate_levels) for level in range(1, depth + 1)], dtype=torch.float64)
        torch.testing.assert_close(change, wanted[1] * mask, **NEAR)
        made = [tensor.cpu().double() for tensor in out]
        assert_rows_hold(made[:2], case.rows[: full_depth + 1], wanted[2:4], NEAR)
        if full_depth < depth:
            assert_rows_hold(made[2:], case.rows[full_depth + 1 :], wanted[4:], NEAR)


def test_matrices_too_large_for_memory_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, 1, tokens=2, sizes=(20, 5, 2))
    grad = random_like(case.x, 2, 20).to(DEVICE, torch.float32)
    x, path, rows, nodes = on_device(case)
    results = []
    for most in (fused.SUM_NUMBERS, 1):
        monkeypatch.setattr(fused, "SUM_NUMBERS", most)
        out = unwritten(nodes)
        y = fused_forward(x, path, rows, nodes, 1)
        results.append((y, *fused_backward(x, grad, path, rows, nodes, 1, (1, 2), out), *out))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_long_run_is_cut_into_parts() -> None:
    """Few groups of many tokens: their outer products are made by several programs and added up."""
    case = make_case(1, 1, tokens=300, sizes=(4, 6, 1))
    grad_y = random_like(case.x, 300, 4)
    wanted = wanted_gradients(case, torch.ones(300, 1, dtype=torch.float64), grad_y)
    x, path, rows, nodes = on_device(case)
    out = unwritten(nodes)
    fused_backward(x, grad_y.to(DEVICE, torch.float32), path, rows, nodes, 1, (), out)
    assert_rows_hold([tensor.cpu().double() for tensor in out[:2]], case.rows, wanted[2:4], {"rtol": 1e-4, "atol": 1e-3})


@pytest.mark.thorough
def test_gradients_are_summed_up_trees_of_more_levels_than_one_program_sums() -> None:
    """Seven levels are three launches; eight nodes below one on the last three levels and on those above; and one leaf."""
    for leaf in (torch.tensor([*range(8), *range(8, 64, 8), 64, 96, 97, 127, 127]), torch.full((5,), 77)):
        path = batched_path(leaf.to(DEVICE), 7)
        number = path.nodes.bounds[-1]
        shapes = ((number, 3, 4), (number, 3), (0, 1, 4), (0, 2, 3))
        out = NodeTensors(*(torch.full(shape, torch.nan, device=DEVICE) for shape in shapes))
        x, grad = torch.randn(len(leaf), 4).to(DEVICE), torch.randn(len(leaf), 3).to(DEVICE)
        fused._full_gradients(out, x, grad, path, 7)
        assert path.number_LT is not None
        products = torch.einsum("tp,tq->tpq", grad, x)[path.order_T].repeat(8, 1, 1)
        wanted = torch.zeros(number, 3, 4, device=DEVICE).index_add_(0, path.number_LT.flatten(), products)
        torch.testing.assert_close(out.weight_SPQ, wanted, **NEAR)
        bias = torch.zeros(number, 3, device=DEVICE).index_add_(0, path.number_LT.flatten(), grad[path.order_T].repeat(8, 1))
        torch.testing.assert_close(out.bias_SP, bias, **NEAR)
