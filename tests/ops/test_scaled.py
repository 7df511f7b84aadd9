"""Products whose levels carry a factor per token: forward and backward against a loop over single tokens in float64."""

from typing import Any

import pytest
import torch

from distcond.ops import NodeTensors, tree_backward, tree_forward
from tests.ops.test_tree_matmul import CASES, EXACT, assert_rows_hold, make_case, naive, schedules


def factors(tokens: int, depth: int) -> torch.Tensor:
    return torch.rand(tokens, depth, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("missing", [0.0, 0.5])
@pytest.mark.parametrize(("depth", "full_depth", "details"), CASES)
def test_forward_is_the_scaled_sum_along_each_tokens_path(
    depth: int, full_depth: int, details: dict[str, Any], missing: float
) -> None:
    case = make_case(depth, full_depth, missing=missing, **details)
    scale = factors(len(case.leaf), depth)
    expected = naive(case, case.nodes, case.x, scale)
    for schedule in schedules(case):
        y = tree_forward(case.x, case.path, case.rows, case.nodes, schedule, scale)
        torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize(("depth", "full_depth", "details"), CASES)
def test_backward_is_the_gradient_of_the_scaled_sum(depth: int, full_depth: int, details: dict[str, Any]) -> None:
    case = make_case(depth, full_depth, **details)
    x, scale = case.x.clone().requires_grad_(), factors(len(case.leaf), depth).requires_grad_()
    nodes = NodeTensors(*(tensor.clone().requires_grad_() for tensor in case.nodes))
    y = naive(case, nodes, x, scale)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    linked = sum(tensor.sum() for tensor in (x, scale, *nodes))
    wanted = torch.autograd.grad((y * grad_y).sum() + 0 * linked, (x, scale, *nodes))
    for schedule in schedules(case):
        out = NodeTensors(*(torch.full_like(tensor, torch.nan) for tensor in case.nodes))  # every number must be written
        tree = (case.path, case.rows, case.nodes, schedule)
        grad_x, grad_scale = tree_backward(case.x, grad_y, *tree, range(1, depth + 1), out, scale_TK=scale.detach())
        torch.testing.assert_close(grad_x.unflatten(0, (-1, case.trees)).sum(1), wanted[0], **EXACT)
        torch.testing.assert_close(grad_scale, wanted[1], **EXACT)
        assert_rows_hold(out[:2], case.rows[: full_depth + 1], wanted[2:4])
        if full_depth < depth:
            assert_rows_hold(out[2:], case.rows[full_depth + 1 :], wanted[4:])
