"""Products of tokens with trees of matrices; plain torch."""

from distcond.ops.path import NodeTensors, Schedule, TreePath
from distcond.ops.tree_matmul import tree_backward, tree_forward

__all__ = ["NodeTensors", "Schedule", "TreePath", "tree_backward", "tree_forward"]
