"""Products of tokens with trees of matrices; plain torch."""

from distcond.ops.path import NodeTensors, Schedule, TreePath
from distcond.ops.scaled import scaled_backward, scaled_forward
from distcond.ops.tree_matmul import tree_backward, tree_forward

__all__ = ["NodeTensors", "Schedule", "TreePath", "scaled_backward", "scaled_forward", "tree_backward", "tree_forward"]
