"""What is read from a model: flips of a bit, and maps in which no token is lost."""

import itertools
import math

import numpy as np
import pytest
import torch

from distcond.nn import TreeLinear
from distcond.nn.tree_parts import node_keys, node_norms
from distcond.report.levels import flipped, visits
from distcond.report.probe import LayerUse
from distcond.report.tree_map import MOST_BOXES, _boxes, _merged, _starts, _visited, path_of, tree_map
from tests.trees import random_tree


@pytest.fixture(name="x_TQ")
def make_inputs() -> torch.Tensor:
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(1))


def nodes_and_norms(layer: TreeLinear) -> tuple[torch.Tensor, torch.Tensor]:
    keys = node_keys(layer)
    return keys, node_norms(layer, keys)


def use_of(layer: TreeLinear, leaves: torch.Tensor) -> LayerUse:
    leaf_V, count_V = leaves.unique(return_counts=True)
    return LayerUse(leaf_V, count_V, torch.zeros(0, layer.in_features), None)


@pytest.mark.parametrize("depth", [1, 12, 62])
def test_a_tree_of_any_depth_is_drawn_in_few_boxes_that_hold_every_token(depth: int) -> None:
    layer = TreeLinear(4, 4, depth, full_depth=0, rank=1, storage="lazy")
    assert layer.table is not None
    leaves = torch.randint(2**depth, (8000,), generator=torch.Generator().manual_seed(0))
    use = use_of(layer, leaves)
    for level in range(depth + 1):
        layer.table.ensure_rows("low" if level else "full", visits(use, depth, level)[0] + 2**level - 1)
    levels = _visited(layer, use, 0, *nodes_and_norms(layer))
    boxes = _boxes(levels)
    assert len(boxes) <= MOST_BOXES
    for level in range(depth + 1):
        here = [box for box in boxes if box.level == level]
        assert sum(box.tokens for box in here) == 8000
        assert sum(box.number for box in here) == len(visits(use, depth, level)[0])
        assert math.isclose(sum(box.width for box in here), 1, rel_tol=1e-9)
        assert all(left.left + left.width <= right.left + 1e-9 for left, right in itertools.pairwise(here))


def test_only_narrow_neighbours_become_one() -> None:
    layer = TreeLinear(4, 4, 10, storage="lazy")
    assert layer.table is not None
    leaves = torch.cat([torch.zeros(10_000), torch.arange(500, 600), torch.full((10_000,), 1023)]).long()
    use = use_of(layer, leaves)
    layer.table.ensure_rows("full", visits(use, 10, 10)[0] + 1023)
    (*_, last) = _visited(layer, use, 0, *nodes_and_norms(layer))
    assert [(box.number, box.tokens) for box in _boxes([last])] == [(1, 10_000), (100, 100), (1, 10_000)]


def test_a_wide_gap_parts_narrow_neighbours() -> None:
    """Half of the tokens, between two runs of narrow nodes, went where no node of this level exists."""
    layer = TreeLinear(4, 4, 10, storage="lazy")
    assert layer.table is not None
    narrow = torch.cat([torch.arange(100), torch.arange(600, 700)])
    use = use_of(layer, torch.cat([narrow.repeat(50), torch.full((10_000,), 300)]))
    layer.table.ensure_rows("full", narrow + 1023)
    (*_, last) = _visited(layer, use, 0, *nodes_and_norms(layer))
    # Each node has 1/400 of the tokens, 2.5 units, so it is narrow only for a larger least width.
    assert [box.number for box in _merged(last, _starts(last, 0.01))] == [100, 100]


def test_nodes_are_named_by_their_bits(tmp_path: object, x_TQ: torch.Tensor) -> None:
    layer = random_tree(3, sizes=(8, 6), dtype=torch.float32, num_trees=2, storage="dense")
    leaf_TM = layer.leaf(x_TQ) + (torch.arange(2) << 3)
    found = tree_map("x", layer, use_of(layer, leaf_TM.flatten()), [], tmp_path, 0)  # type: ignore[arg-type]
    codes = layer.codes(x_TQ)
    for node in found.nodes:
        tree, _, bits = path_of(layer, node).partition(": ")
        wanted = torch.tensor([bit == "1" for bit in bits if bits != "root"], dtype=torch.bool)
        on_path = (codes[:, int(tree), : len(wanted)] == wanted).all(1)
        assert node.tokens == int(on_path.sum()) and node.width == pytest.approx(node.tokens / len(x_TQ))
    assert len(found.icicles) == 2 and sum(found.leaf_loads) == pytest.approx(2)
    assert found.tokens == len(x_TQ)
    assert found.path_numbers == 2 * 4 * (3 * 8 + 3) and found.numbers == 30 * (3 * 8 + 3)


def test_a_flipped_bit_is_that_bit_alone(x_TQ: torch.Tensor) -> None:
    layer = random_tree(3, sizes=(8, 6), dtype=torch.float32, num_trees=2, storage="dense")
    before = layer.codes(x_TQ)
    with flipped(layer, 2):
        changed = layer.codes(x_TQ) != before
    assert np.array_equal(changed.numpy(), np.broadcast_to([False, True, False], before.shape))
    assert torch.equal(layer.codes(x_TQ), before)
