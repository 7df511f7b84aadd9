"""Touched rows of a table as copies elsewhere: rows may stay in host memory while a GPU computes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distcond.ops import NodeTensors
from distcond.table.node_table import NodeTable


def copy_rows(table: NodeTable, rows: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], NodeTensors]:
    """Where each touched node is among the copies, per level, -1 where it does not exist; and the copies.

    rows: per level, as `NodeTable.find` gives them. Costs one transfer for each kind of node.
    """
    first_low = table.full_depth + 1
    places: list[Tensor] = []
    copies: list[Tensor] = []
    for store, levels in ((table.full, rows[:first_low]), (table.low, rows[first_low:])):
        copied = store.data[:0]
        if levels:
            rows_G = torch.cat(list(levels))
            copied = store.data.index_select(0, rows_G.clamp(min=0)) if store.size else copied
            place_G = torch.where(rows_G < 0, -1, torch.arange(len(rows_G), device=rows_G.device)).to(device)
            places += place_G.split([len(level_G) for level_G in levels])
        copies.append(copied.to(device))
    return places, table.as_matrices(*copies)
