"""Copies of touched rows: each node finds its own among them, wherever they are."""

import pytest
import torch

from distcond.table import NodeTable, copy_rows


def table_of(levels: list[list[int]]) -> NodeTable:
    """Nodes of random numbers, the last level of low rank."""
    table = NodeTable(5, 4, 2, 1, 2, seed=0, bias=True)
    table.ensure([torch.tensor(level, dtype=torch.int64) for level in levels])
    for _, store in table.stores():
        store.data.normal_(generator=torch.Generator().manual_seed(1))
    return table


LEVELS = [[0], [1, 2], [4, 6]]


@pytest.mark.parametrize("there", [LEVELS, [[0], [2], []], [[0], [1, 2], [3, 5, 6]]])
def test_a_node_has_its_own_row_among_the_copies_or_zeros(there: list[list[int]]) -> None:
    table = table_of(there)
    rows = table.find([torch.tensor(level) for level in LEVELS])
    places, copies = copy_rows(table, rows, torch.device("cpu"))
    stored = table.tensors()
    assert [place.tolist() for place in places] == [[0], [1, 2], [0, 1]]
    for number, (place_G, rows_G) in enumerate(zip(places, rows, strict=True)):
        exists_G = rows_G >= 0
        for copy, own in zip(copies[2:] if number == 2 else copies[:2], stored[2:] if number == 2 else stored[:2], strict=True):
            assert torch.equal(copy[place_G[exists_G]], own[rows_G[exists_G]])
            assert not copy[place_G[~exists_G]].any()


def test_copies_are_on_the_device_asked_for() -> None:
    table = table_of(LEVELS)
    places, copies = copy_rows(table, table.find([torch.tensor(level) for level in LEVELS]), torch.device("meta"))
    assert {part.device.type for part in (*places, *copies)} == {"meta"}
    assert len(copies.weight_SPQ) == 3 and len(copies.right_SrQ) == 2
