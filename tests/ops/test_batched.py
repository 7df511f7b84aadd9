"""The tree product of other devices, run on a CPU: against a loop over single tokens, and without a wait for the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distcond.ops import (
    Level,
    NodeTensors,
    Schedule,
    TreePath,
    batched,
    factor_dtype,
    tree_backward,
    tree_forward,
)
from distcond.ops.batched import batched_backward, batched_forward
from distcond.ops.batched_path import batched_path
from distcond.ops.path import gradient_rows
from tests.ops.test_native import leaves_of
from tests.ops.test_scaled import factors
from tests.ops.test_tree_matmul import DETAILS, EXACT, SHAPES, Case, assert_rows_hold, contribution, make_case, naive
from tests.pairs import every_pair

WAITS = {
    Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
}  # fmt: skip
"Of Python, which asks a CPU tensor for its numbers without an operator."


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a GPU: numbers asked for, and results whose size depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            self.names.append(func.__name__)
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        knows_size = kwargs.get("output_size") is not None
        if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags) and not knows_size:
            self.names.append(str(func))
        return func(*args, **kwargs)


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    with Waits() as waits, Operators(waits.names):
        yield waits.names


# ---- the path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forest", "tokens", "kind"), every_pair([(0, 1), (5, 1), (62, 1), (5, 3)], [0, 1, 13], ["some", "one", "own"])
)
def test_path_is_that_of_the_cpu_and_waits_once(forest: tuple[int, int], tokens: int, kind: str) -> None:
    depth, num_trees = forest
    leaf = leaves_of(kind, tokens, depth)
    leaf += (torch.arange(tokens) % num_trees) << depth
    with counted_waits() as waits:
        path = batched_path(leaf, depth, num_trees)
    assert waits == (["tolist"] if tokens else [])
    wanted = TreePath.of(leaf, depth, num_trees)
    assert torch.equal(path.order_T, wanted.order_T) and torch.equal(path.place_T, wanted.place_T)
    for number, (level, other) in enumerate(zip(path.levels, wanted.levels, strict=True)):
        assert torch.equal(level.nodes_G, other.nodes_G) and torch.equal(level.count_G, other.count_G)
        assert number == 0 or torch.equal(level.parent_G, other.parent_G)
    with counted_waits() as waits:
        TreePath.of(leaf, depth, num_trees)
    assert len(waits) == depth + 2  # this counter sees what it is to see


def test_values_and_gradient_rows_of_each_token_wait_for_nothing() -> None:
    case = make_case(5, 2, tokens=13, trees=2)
    path = batched_path(case.leaf, 5, 2)
    slots = gradient_rows(case.rows, 2)
    full, low = (list(range(sum(len(rows) for rows in kind))) for kind in (case.rows[:3], case.rows[3:]))
    assert [row for slot in slots[:3] for row in range(*slot.indices(len(full)))] == full
    assert [row for slot in slots[3:] for row in range(*slot.indices(len(low)))] == low
    with counted_waits() as waits:
        ids_TL, slots_TL = path.per_token(path.nodes[3:]), path.slots_per_token(slots[3:])
    assert not waits
    for place, number in enumerate(range(3, 6)):
        level, slot = path.levels[number], slots[number]
        prefix_T = (case.leaf & 31) >> (5 - number)
        assert torch.equal(ids_TL[:, place][path.place_T] - 2 * (2**number - 1), ((case.leaf >> 5) << number) + prefix_T)
        assert torch.equal(level.nodes_G[slots_TL[:, place] - slot.start], ids_TL[:, place])
    with counted_waits() as waits:
        path.levels[4].per_token(path.nodes[4])
    assert len(waits) == 1  # this counter sees what it is to see


# ---- forward and backward --------------------------------------------------------------------------------------------


def schedules(case: Case) -> list[Schedule]:
    """Nothing merged, some, all."""
    full = case.full_depth
    return [Schedule(full, merged, full + 1) for merged in sorted({0, full // 2, full})]


def wanted_gradients(case: Case, scale: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """Of x, of the scale, and of the stored nodes, by autograd."""
    x, scale = case.x.clone().requires_grad_(), scale.clone().requires_grad_()
    nodes = NodeTensors(*(tensor.clone().requires_grad_() for tensor in case.nodes))
    inputs = (x, scale, *nodes)
    y = naive(replace(case, nodes=nodes), nodes, x, scale)
    return torch.autograd.grad((y * grad_y).sum() + 0 * sum(tensor.sum() for tensor in inputs), inputs)


def unwritten(nodes: NodeTensors) -> NodeTensors:
    """Room for a gradient in which every number must be written."""
    return NodeTensors(*(torch.full_like(tensor, torch.nan) for tensor in nodes))


def random_like(tensor: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=tensor.dtype)


SOME = [
    *((*shape, DETAILS[0]) for shape in SHAPES[:-1]),
    *((*shape, details) for shape in SHAPES[4:7:2] for details in DETAILS[2:]),
]


@pytest.mark.parametrize("missing", [0.0, 0.5])
@pytest.mark.parametrize(("depth", "full_depth", "details"), SOME)
def test_forward_is_the_sum_along_each_tokens_path(depth: int, full_depth: int, details: dict[str, Any], missing: float) -> None:
    case = make_case(depth, full_depth, missing=missing, **details)
    for scale in (torch.ones(len(case.leaf), depth, dtype=torch.float64), factors(len(case.leaf), depth)):
        expected = naive(case, case.nodes, case.x, scale)
        for schedule in schedules(case):
            y = batched_forward(case.x, case.path, case.rows, case.nodes, schedule, scale)
            torch.testing.assert_close(y, expected, **EXACT)
            if (scale == 1).all():
                y = batched_forward(case.x, case.path, case.rows, case.nodes, schedule)
                torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("depth", "full_depth", "details"), SOME)
def test_backward_is_the_gradient_of_the_sum(depth: int, full_depth: int, details: dict[str, Any], scaled: bool) -> None:
    case = make_case(depth, full_depth, **details)
    scale = factors(len(case.leaf), depth) if scaled else torch.ones(len(case.leaf), depth, dtype=torch.float64)
    grad_y = random_like(case.x, len(case.leaf), case.nodes.bias_SP.shape[1])
    wanted = wanted_gradients(case, scale, grad_y)
    for schedule in schedules(case):
        for gate_levels in (range(1, depth + 1), range(depth, 0, -2)):
            out = unwritten(case.nodes)
            backward = (case.x, grad_y, case.path, case.rows, case.nodes, schedule, gate_levels, out)
            grad_x, grad_levels = batched_backward(*backward, scale if scaled else None)
            torch.testing.assert_close(grad_x.unflatten(0, (-1, case.trees)).sum(1), wanted[0], **EXACT)
            mask = torch.tensor([float(level in gate_levels) for level in range(1, depth + 1)], dtype=torch.float64)
            torch.testing.assert_close(grad_levels, wanted[1] * mask, **EXACT)
            assert_rows_hold(out[:2], case.rows[: full_depth + 1], wanted[2:4])
            if full_depth < depth:
                assert_rows_hold(out[2:], case.rows[full_depth + 1 :], wanted[4:])


def test_matrices_too_large_for_memory_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(3, 2, sizes=(40, 5, 2), missing=0.5)
    whole = make_case(3, 2, sizes=(40, 5, 2))
    schedule, grad_y = Schedule(2, 1, 3), random_like(case.x, 11, 40)
    expected = batched_forward(case.x, case.path, case.rows, case.nodes, schedule)
    results = []
    for most in (batched.SUM_NUMBERS, 1):
        monkeypatch.setattr(batched, "SUM_NUMBERS", most)
        torch.testing.assert_close(batched_forward(case.x, case.path, case.rows, case.nodes, schedule), expected, **EXACT)
        out = unwritten(whole.nodes)
        grads = batched_backward(whole.x, grad_y, whole.path, whole.rows, whole.nodes, schedule, (1, 2, 3), out)
        results.append((*grads, *out))
    torch.testing.assert_close(*results, **EXACT)
    parts = [part for part, _ in batched._Full.of(case.path, case.rows, case.nodes, schedule, True, torch.float64).parts()]
    assert parts == [slice(0, 16), slice(16, 32), slice(32, 48)]


def test_a_forest_is_trees_side_by_side() -> None:
    """A tree without its root is a forest of two."""
    case = make_case(4, 3)
    depth, trees = 3, TreePath(case.path.order_T, case.path.place_T, case.path.levels[1:])
    assert len(trees.levels[0].nodes_G) == 2
    ones, grad_y = torch.ones(11, 4, dtype=torch.float64), random_like(case.x, 11, 3)
    roots = torch.stack([contribution(case, token, 0, case.nodes, case.x) for token in range(11)])
    expected = naive(case, case.nodes, case.x, ones) - roots
    wanted = wanted_gradients(case, ones, grad_y)
    root = int(case.rows[0])
    for merged in range(3):
        schedule = Schedule(2, merged, 3)
        y = batched_forward(case.x, trees, case.rows[1:], case.nodes, schedule)
        torch.testing.assert_close(y, expected, **EXACT)
        out = unwritten(NodeTensors(*(tensor[1:] for tensor in case.nodes[:2]), *case.nodes[2:]))
        grad_x, grad_levels = batched_backward(
            case.x, grad_y, trees, case.rows[1:], case.nodes, schedule, range(1, depth + 1), out
        )
        torch.testing.assert_close(grad_x, wanted[0] - grad_y @ case.nodes.weight_SPQ[root], **EXACT)
        torch.testing.assert_close(grad_levels, wanted[1][:, 1:], **EXACT)
        assert_rows_hold(out[:2], case.rows[1:4], wanted[2:4])


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8, 16, 2), (5, 3, 2)])  # the second one suits no grouped kernel
def test_short_tokens_meet_rows_in_their_own_precision(sizes: tuple[int, int, int]) -> None:
    """Factors and products are rounded to bf16, once each, and nothing else is."""
    case = make_case(4, 3, tokens=30, sizes=sizes, missing=0.0)
    x, grad_y = case.x.bfloat16(), random_like(case.x, 30, sizes[0]).bfloat16()
    nodes = NodeTensors(*(tensor.float() for tensor in case.nodes))
    exact = Case(x.double(), case.leaf, case.path, case.rows, NodeTensors(*(tensor.double() for tensor in nodes)), 3, 2, 1)
    positive = replace(exact, x=exact.x.abs(), nodes=NodeTensors(*(tensor.abs() for tensor in exact.nodes)))
    scale = torch.ones(30, 4, dtype=torch.float64)
    wanted, size = (
        (naive(one, one.nodes, one.x, scale), *wanted_gradients(one, scale, grad))
        for one, grad in ((exact, grad_y.double()), (positive, grad_y.double().abs()))
    )
    out = unwritten(nodes)
    y = batched_forward(x, case.path, case.rows, nodes, Schedule(3, 2, 4))
    grads = batched_backward(x, grad_y, case.path, case.rows, nodes, Schedule(3, 2, 4), range(1, 5), out)
    rows = [torch.cat(rows) for rows in (case.rows[:4], case.rows[4:]) for _ in range(2)]
    stored = [(w[i], s[i]) for w, s, i in zip(wanted[3:], size[3:], rows, strict=True)]
    for got, (number, most) in zip((y, *grads, *out), [*zip(wanted[:3], size[:3], strict=True), *stored], strict=True):
        assert got.dtype == torch.float32
        # A matrix and a product are rounded, each by 2**-8; 1e-5 is for sums in fp32.
        assert ((got - number).abs() <= (2**-7 + 1e-5) * most + 1e-5).all()
    exact_out, exact_bias = out.weight_SPQ, out.bias_SP
    torch.testing.assert_close(exact_bias.double(), stored[1][0], rtol=1e-5, atol=1e-5)  # no product: sums in fp32
    assert not torch.equal(exact_out.double(), stored[0][0])


# ---- no wait for the device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_asked_of_the_device(dtype: torch.dtype, scaled: bool) -> None:
    case = make_case(4, 3, tokens=30, sizes=(8, 16, 2))
    x, grad_y = case.x.to(dtype), random_like(case.x, 30, 8).to(dtype)
    nodes, scale = NodeTensors(*(tensor.float() for tensor in case.nodes)), factors(30, 4).float() if scaled else None
    with counted_waits() as waits:
        batched_forward(x, case.path, case.rows, nodes, Schedule(3, 2, 4), scale)
        batched_backward(x, grad_y, case.path, case.rows, nodes, Schedule(3, 2, 4), range(1, 5), unwritten(nodes), scale)
    assert waits == []


def moved(path: TreePath) -> TreePath:
    """A path on the meta device, which has no numbers to ask for."""
    levels = [Level(*(part.to("meta") for part in (level.nodes_G, level.parent_G, level.count_G))) for level in path.levels]
    return TreePath(path.order_T.to("meta"), path.place_T.to("meta"), levels)


def test_on_other_devices_levels_are_merged_or_gathered_and_none_goes_node_by_node() -> None:
    nodes = NodeTensors(*(torch.zeros(0, *shape) for shape in ((64, 64), (64,), (1, 64), (2, 64))))
    one_leaf, uniform = (moved(TreePath.of(leaf, 10)) for leaf in (torch.full((1024,), 77), torch.arange(2**10)))
    assert Schedule.of(one_leaf, 4, nodes) == Schedule(full_depth=4, merged=4, gathered=5)
    assert Schedule.of(uniform, 8, nodes) == Schedule(full_depth=8, merged=8, gathered=9)  # 2**8 nodes of 4 tokens


def test_tensors_on_other_devices_are_batched() -> None:
    case = make_case(4, 3, tokens=30, sizes=(8, 16, 2))
    path, rows = moved(case.path), [row.to("meta") for row in case.rows]
    nodes, x = NodeTensors(*(tensor.to("meta") for tensor in case.nodes)), case.x.to("meta")
    schedule, out, grad_y, scale = Schedule(3, 2, 4), unwritten(nodes), x.new_empty(30, 8), x.new_empty(30, 4)
    assert factor_dtype(torch.bfloat16, nodes) == torch.bfloat16 != factor_dtype(torch.bfloat16, case.nodes)
    assert factor_dtype(torch.float32, NodeTensors(*(tensor.bfloat16() for tensor in nodes))) == torch.bfloat16
    assert tree_forward(x, path, rows, nodes, schedule).shape == (30, 8)
    assert tree_forward(x, path, rows, nodes, schedule, scale).shape == (30, 8)
    grads = tree_backward(x, grad_y, path, rows, nodes, schedule, (1,), out)
    assert [grad.shape for grad in grads] == [(30, 16), (30, 4)]
    grads = tree_backward(x, grad_y, path, rows, nodes, schedule, range(1, 5), out, scale_TK=scale)
    assert [grad.shape for grad in grads] == [(30, 16), (30, 4)]
