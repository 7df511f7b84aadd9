"""Touched rows of a table as copies elsewhere: rows may stay in host memory while a GPU computes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distcond.ops import NodeTensors
from distcond.table.node_table import NodeTable


def copy_rows(table: NodeTable, rows: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], NodeTensors]:
    """Where each touched node is among the copies, per level; and the copies, zeros for nodes that do not exist.

    rows: per level, as `NodeTable.find` gives them. Costs one transfer for each kind of node.
    """
    first_low = table.full_depth + 1
    places: list[Tensor] = []
    copies: list[Tensor] = []
    for store, levels in ((table.full, rows[:first_low]), (table.low, rows[first_low:])):
        copied = store.data[:0]
        if levels:
            rows_G = torch.cat(list(levels))
            copied = store.data_with_zeros.index_select(0, torch.where(rows_G < 0, store.size, rows_G))
            place_G = torch.arange(len(rows_G), device=device)
            places += place_G.split([len(level_G) for level_G in levels])
        copies.append(copied.to(device))
    return places, table.as_matrices(*copies)
