"""The parts of a layer are exact, and nodes are as large as their matrices."""

from typing import Any

import pytest
import torch

from distcond.nn import TreeLinear
from distcond.nn.tree_parts import contributions, node_keys, node_norms, path_of
from distcond.ops import first_node
from tests.trees import random_tree, tokens

OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"depth": 3, "storage": "dense"},
    "low rank": {"depth": 5, "full_depth": 2, "rank": 2, "storage": "lazy"},
    "forest": {"depth": 3, "full_depth": 1, "rank": 2, "num_trees": 2, "storage": "lazy"},
    "scaled": {"depth": 3, "full_depth": 1, "rank": 2, "gate_gradient": "magnitude", "storage": "dense"},
    "no bias": {"depth": 2, "bias": False, "storage": "host"},
}


@pytest.fixture(params=OPTIONS.values(), ids=list(OPTIONS), name="layer")
def make_layer(request: pytest.FixtureRequest) -> TreeLinear:
    return random_tree(sizes=(8, 6), **request.param).eval()


def test_parts_add_up_to_the_output_in_the_precision_asked_for(layer: TreeLinear) -> None:
    x_TQ = tokens(40, 8)
    matrix_TMLP, bias_TMLP = contributions(layer, x_TQ)
    assert matrix_TMLP.shape == (40, layer.num_trees, layer.depth + 1, 6 // layer.num_trees) == bias_TMLP.shape
    assert float(matrix_TMLP[:, :, -1].abs().max()) > 0 and bool(bias_TMLP.any()) == layer.has_bias
    torch.testing.assert_close((matrix_TMLP + bias_TMLP).sum(2).flatten(1), layer(x_TQ).detach())
    short, _ = contributions(layer, x_TQ, dtype=torch.float32)
    torch.testing.assert_close(short, matrix_TMLP.float())


def test_a_part_is_the_node_of_the_given_leaf_times_the_input(layer: TreeLinear) -> None:
    x_1Q = tokens(1, 8)
    leaf_1M = layer.leaf(x_1Q) ^ 1
    matrix_TMLP, _ = contributions(layer, x_1Q, leaf_1M)
    for tree, leaf in enumerate(leaf_1M[0].tolist()):
        for level, node in enumerate(path_of(leaf, layer.depth)):
            scale = layer.gates(x_1Q)[0, tree, level - 1].abs().tanh() if level and layer.scales_levels else 1.0
            torch.testing.assert_close(matrix_TMLP[0, tree, level], scale * (layer.node_weight(node, tree) @ x_1Q[0]))


def test_norms_are_those_of_the_matrices(layer: TreeLinear) -> None:
    keys = node_keys(layer)
    assert len(keys) == layer.num_materialized and bool((keys[1:] > keys[:-1]).all())
    for key, norm in zip(keys.tolist(), node_norms(layer, keys).tolist(), strict=True):
        level = next(level for level in range(layer.depth + 1) if key < first_node(level + 1, layer.num_trees))
        tree, inside = divmod(key - first_node(level, layer.num_trees), 2**level)
        assert norm == pytest.approx(float(layer.node_weight(2**level - 1 + inside, tree).detach().norm()), rel=1e-5)


def test_nodes_that_do_not_exist_have_no_norm() -> None:
    layer = TreeLinear(5, 4, 40, full_depth=1, rank=1, storage="lazy")
    layer.set_root(torch.full((4, 5), 0.5), None)
    norms = node_norms(layer, torch.tensor([2**40, 0, 2]))
    assert norms.tolist() == pytest.approx([0, 0.5 * 20**0.5, 0])
