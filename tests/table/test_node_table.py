"""NodeTable: nodes are born as zeros in effect, wherever and whenever, and those that exist are left alone."""

import copy
from typing import Any

import pytest
import torch

from distcond.table import NodeTable

LEVELS = [torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([4, 5]), torch.tensor([9, 12])]


def make_table(**options: Any) -> NodeTable:
    return NodeTable(
        **({"in_features": 5, "out_features": 4, "depth": 3, "full_depth": 1, "rank": 2, "seed": 7, "bias": True} | options)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_newborn_nodes_are_zero_but_for_the_right_factors_of_low_rank_ones(bias: bool) -> None:
    table = make_table(bias=bias)
    table.ensure(LEVELS)
    nodes = table.tensors()
    assert nodes.weight_SPQ.shape == (3, 4, 5) and nodes.right_SrQ.shape == (4, 2, 5)
    assert not any(tensor.any() for name, tensor in nodes._asdict().items() if name != "right_SrQ")
    assert (nodes.right_SrQ != 0).all() and nodes.right_SrQ.abs().max() <= (3 / 5) ** 0.5


def test_right_factors_have_variance_one_over_in_features() -> None:
    table = make_table(depth=12, full_depth=0, rank=3)
    rows = table.newborn("low", torch.arange(1, 3000))
    right = table.as_matrices(table.full.data, rows).right_SrQ.double()
    # 45,000 uniform numbers of variance 1/5: five standard errors of the variance are 5 x 0.2 sqrt(0.8 / 45000).
    assert abs(float(right.square().mean()) - 0.2) < 5 * 0.2 * (0.8 / right.numel()) ** 0.5


def test_a_node_is_the_same_whenever_and_with_whomever_it_is_born() -> None:
    together, apart = make_table(), make_table()
    together.ensure(LEVELS)
    for only in ([LEVELS[0], LEVELS[1][1:], LEVELS[2][1:], LEVELS[3][1:]], LEVELS):
        apart.ensure(only)
    for name, store in together.stores():
        other = dict(apart.stores())[name]
        assert sorted(store.keys.tolist()) == sorted(other.keys.tolist())
        assert torch.equal(store.data, other.data[other.find(store.keys)])
    assert not torch.equal(make_table(seed=8).newborn("low", LEVELS[3]), make_table().newborn("low", LEVELS[3]))


def test_nodes_that_exist_are_left_alone() -> None:
    table = make_table()
    rows = table.ensure(LEVELS)
    table.full.data.fill_(1.0), table.low.data.fill_(2.0)
    again = table.ensure([*LEVELS[:3], torch.tensor([8, 9, 12])])
    assert [row.tolist() for row in again[:3]] == [row.tolist() for row in rows[:3]]
    assert again[3].tolist() == [4, *rows[3].tolist()] and again[3][0] == table.low.size - 1
    assert (table.full.data == 1.0).all() and (table.low.data[:4] == 2.0).all()


def test_finding_gives_rows_by_level_and_makes_none() -> None:
    table = make_table()
    assert [row.tolist() for row in table.find(LEVELS)] == [[-1], [-1, -1], [-1, -1], [-1, -1]]
    table.ensure([level[:1] for level in LEVELS])
    assert [row.tolist() for row in table.find(LEVELS)] == [[0], [1, -1], [0, -1], [1, -1]]
    assert table.full.size == table.low.size == 2


def test_a_gradient_reaches_the_rows_of_its_nodes() -> None:
    table = make_table()
    table.ensure(LEVELS)
    full, low = table.new_gradient(LEVELS)
    assert full.shape == (3, table.full.width) and low.shape == (4, table.low.width)
    full.copy_(torch.arange(3.0)[:, None].expand_as(full))
    low.copy_(torch.arange(4.0)[:, None].expand_as(low))
    table.add_gradient(table.find(LEVELS), full, low)
    for store, nodes in ((table.full, [0, 1, 2]), (table.low, [4, 5, 9, 12])):
        rows, grad = store.take_gradient()
        assert store.keys[rows].tolist() == nodes and grad[:, 0].tolist() == [float(place) for place in range(len(nodes))]


def test_matrices_are_those_of_the_rows_there_are_now() -> None:
    table = make_table()
    with torch.inference_mode():
        table.tensors()
    table.ensure(LEVELS[:2])
    nodes = table.tensors()
    assert table.tensors() is nodes and not nodes.weight_SPQ.is_inference()
    table.full.data[:] = 3.0
    assert (nodes.weight_SPQ == 3.0).all()
    table.ensure(LEVELS)
    assert len(table.tensors().right_SrQ) == 4
    table.full.replace(table.full.keys[:1].clone(), table.full.data[:1].clone())
    assert len(table.tensors().weight_SPQ) == 1
    copied = copy.deepcopy(table)
    copied.full.data[:] = 5.0
    assert (copied.tensors().weight_SPQ == 5.0).all() and (table.tensors().weight_SPQ == 3.0).all()
