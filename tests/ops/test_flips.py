"""What gates learn from flips by the compiled kernels, against the difference of two products in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distcond.nn.tree_product import TreeProduct
from distcond.ops import (
    Flip,
    NodeTensors,
    PerLevel,
    TreePath,
    flipped_nodes,
    tree_backward,
    tree_forward,
    use_kernels,
)
from tests.ops.test_native import SIZES, compiled, exactly, make, needs_gcc
from tests.ops.test_tree_matmul import random_leaves
from tests.pairs import every_pair
from tests.trees import random_tree, tokens

# fp32: a sum of up to 600 x 20 products whose parts, of size 30, cancel.
DIFFERENCE = {"rtol": 1e-5, "atol": 1e-3}

__all__ = ["compiled"]


@pytest.mark.parametrize("level", [1, 3, 5])
def test_flipped_nodes_are_those_of_the_flipped_leaves_in_the_same_order(level: int) -> None:
    leaf, depth = random_leaves(40, 5), 5
    path, other = TreePath.of(leaf, depth), TreePath.of(leaf ^ 1 << depth - level, depth)
    for number, (nodes, flipped) in enumerate(zip(path.levels, flipped_nodes(path, level), strict=True)):
        of_token = nodes.per_token(flipped)[path.place_T]
        assert torch.equal(of_token, other.levels[number].per_token(other.levels[number].nodes_G)[other.place_T])


def flip_of(path: TreePath, rows: list[Tensor], level: int, full: int) -> Flip:
    """What a flip makes of the rows: nodes that tokens reach have theirs, others one of any node, or none."""
    flipped: list[Tensor] = []
    becomes = flipped_nodes(path, level)
    for number, (nodes, found) in enumerate(zip(path.nodes, becomes, strict=True)):
        known = dict(zip(nodes.tolist(), rows[number].tolist(), strict=True))
        borrowed = {node: rows[number][node % len(nodes)].item() if node % 3 else -1 for node in found.tolist()}
        flipped.append(torch.tensor([(borrowed | known)[node] for node in found.tolist()]))
    return Flip.of(level, becomes, PerLevel.of(flipped), path, full)


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("size", "missing", "threads"), every_pair([size for size in SIZES if size[0] > 0], [0.0, 0.5], [1, 3]))
def test_flips_are_differences_of_two_products(size: tuple[Any, ...], missing: float, threads: int) -> None:
    x, grad, path, rows, nodes = make(size, missing, bias=missing == 0)
    schedule, exact = exactly(size, nodes, path)
    levels = sorted({1, size[1], size[0]} - {0})
    flips = [flip_of(path, rows, level, size[1]) for level in levels]
    assert size[5] < 30 or any(bool((flip.twin_G >= 0).any()) for flip in flips) or size[6] == "one"
    y = tree_forward(x.double(), path, rows, exact, schedule)
    changes = [tree_forward(x.double(), path, flip.rows, exact, schedule) - y for flip in flips]
    zeros = [torch.where(part < 0, 0, part) for part in rows]  # backward asks for rows that exist
    out, before = NodeTensors(*(torch.empty_like(part) for part in nodes)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        if missing:
            nodes = NodeTensors(*(torch.cat([part, torch.zeros_like(part[:1])]) for part in nodes))
            kinds = [len(nodes.weight_SPQ if number <= size[1] else nodes.right_SrQ) - 1 for number in range(len(rows))]
            zeros = [torch.where(part < 0, kind, part) for part, kind in zip(rows, kinds, strict=True)]
        _, through = tree_backward(x, grad, path, zeros, nodes, schedule, [], out, flips)
    finally:
        torch.set_num_threads(before)
    for level, change in zip(levels, changes, strict=True):
        torch.testing.assert_close(through[:, level - 1].double(), torch.linalg.vecdot(grad.double(), change), **DIFFERENCE)
    assert not through[:, [level - 1 for level in range(1, size[0] + 1) if level not in levels]].any()


SHAPES: list[dict[str, Any]] = [{}, {"bias": False}, {"full_depth": 0, "rank": 2}, {"full_depth": 2, "rank": 1, "num_trees": 3}]


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("options", "gate_gradient", "storage", "count"),
    every_pair(SHAPES, ["flip", "flip_sampled"], ["dense", "lazy"], [7, 300]),
)
def test_a_layer_learns_from_flips_as_with_torch(
    options: dict[str, Any], gate_gradient: str, storage: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one product; and so where only some nodes exist."""
    results, products, apply = [], [], TreeProduct.apply
    monkeypatch.setattr(TreeProduct, "apply", lambda *inputs: products.append(1) or apply(*inputs))
    for name in ("torch", "native"):
        use_kernels(name)
        layer = random_tree(4, sizes=(21, 18), gate_gradient=gate_gradient, storage=storage, dtype=torch.float32, **options)
        if layer.table is not None:
            for _, store in layer.table.stores():
                store.keep(store.keys % 5 != 3)
        x = tokens(count, 21).float().requires_grad_()
        layer(x).square().sum().backward()
        assert layer.gate is not None and x.grad is not None and layer.gate.weight.grad is not None
        results.append((x.grad, layer.gate.weight.grad))
        products.append(0)
    assert products[::-1].index(0) == 0 and products[products.index(0) + 1 :] == [1, 0]
    assert results[0][1].abs().max() > 1
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4 * float(results[0][1].abs().max()))
