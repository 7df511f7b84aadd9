"""Node tables: rows by node id, their placement over ranks, and the exchange of tokens."""

from distcond.table.balance import SubtreeLoads, move_subtrees
from distcond.table.collective import Collective
from distcond.table.copies import copy_rows
from distcond.table.exchange import Route
from distcond.table.growing import huge_empty_like
from distcond.table.growth import Admission, Growth, Visits, admit
from distcond.table.node_table import NodeTable, path_node
from distcond.table.plan import SubtreePlan
from distcond.table.rows import RowStore

__all__ = [
    "Admission",
    "Collective",
    "Growth",
    "NodeTable",
    "Route",
    "RowStore",
    "SubtreeLoads",
    "SubtreePlan",
    "Visits",
    "admit",
    "copy_rows",
    "huge_empty_like",
    "move_subtrees",
    "path_node",
]
