"""Products of tokens with trees of matrices; plain torch."""

from distcond.ops.tree_matmul import NodeTensors, TreePath, tree_backward, tree_forward

__all__ = ["NodeTensors", "TreePath", "tree_backward", "tree_forward"]
