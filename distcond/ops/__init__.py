"""Products of tokens with trees of matrices: plain torch, or compiled kernels where they are asked for."""

from distcond.ops.flips import Flip, flipped_nodes
from distcond.ops.leaf_product import leaf_product
from distcond.ops.native import kernels, use_kernels
from distcond.ops.path import Level, NodeTensors, Schedule, TreePath, calls_are_cheap, factor_dtype, first_node
from distcond.ops.per_level import PerLevel
from distcond.ops.tree_matmul import (
    computes_flips,
    count_nonfinite,
    leaf_index,
    tree_backward,
    tree_forward,
    tree_leaf,
    tree_path,
)

__all__ = [
    "Flip",
    "Level",
    "NodeTensors",
    "PerLevel",
    "Schedule",
    "TreePath",
    "calls_are_cheap",
    "computes_flips",
    "count_nonfinite",
    "factor_dtype",
    "first_node",
    "flipped_nodes",
    "kernels",
    "leaf_index",
    "leaf_product",
    "tree_backward",
    "tree_forward",
    "tree_leaf",
    "tree_path",
    "use_kernels",
]
