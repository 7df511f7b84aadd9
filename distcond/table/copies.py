"""Touched rows of a table as copies elsewhere: rows may stay in host memory while a GPU computes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distcond.ops import NodeTensors, PerLevel
from distcond.table.node_table import NodeTable


def copy_rows(table: NodeTable, rows: Sequence[Tensor], device: torch.device) -> tuple[PerLevel, NodeTensors]:
    """Where each touched node is among the copies, per level; and the copies, zeros for nodes that do not exist.

    rows: per level, as `NodeTable.find` gives them. Costs one transfer for each kind of node.
    """
    rows = PerLevel.of(rows)
    kinds = list(zip((table.full, table.low), rows.split(table.full_depth + 1), strict=True))
    filled = [(store.data_with_zeros, torch.where(rows_N < 0, store.size, rows_N)) for store, rows_N in kinds]
    copies = (data_SW.index_select(0, rows_N).to(device) for data_SW, rows_N in filled)
    places_N = torch.cat([torch.arange(len(rows_N), device=device) for _, rows_N in kinds])
    return PerLevel(places_N, rows.bounds), table.as_matrices(*copies)
