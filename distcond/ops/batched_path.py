"""The path of tokens through a tree on devices other than the CPU: the host waits once, for the numbers of nodes.

Legend: T tokens, K depth, G nodes touched on a level.
"""

import torch
from torch import Tensor

from distcond.ops.path import Level, TreePath, first_node


def batched_path(leaf_T: Tensor, depth: int, num_trees: int = 1) -> TreePath:
    """`TreePath.of`; it costs O(T K) rather than O(T + nodes)."""
    sorted_T, order_T = torch.sort(leaf_T, stable=True)
    token_T = torch.arange(len(leaf_T), device=leaf_T.device)
    prefixes = [sorted_T >> (depth - level) for level in range(depth + 1)]
    indices = [_number_of_run(prefix_T) for prefix_T in prefixes]
    sizes = torch.stack([(index_T[-1:] + 1).sum() for index_T in indices]).tolist()
    levels: list[Level] = []
    for number, (prefix_T, index_T, size) in enumerate(zip(prefixes, indices, sizes, strict=True)):
        # All tokens of a node write the same.
        nodes_G = leaf_T.new_empty(size).scatter_(0, index_T, prefix_T + first_node(number, num_trees))
        parent_G = leaf_T.new_zeros(size).scatter_(0, index_T, indices[max(0, number - 1)])
        count_G = leaf_T.new_zeros(size).index_add_(0, index_T, torch.ones_like(index_T))
        levels.append(Level(nodes_G, parent_G, count_G))
    return TreePath(order_T, torch.empty_like(order_T).index_copy_(0, order_T, token_T), levels)


def _number_of_run(value_T: Tensor) -> Tensor:
    """For each token, how many times the value has changed before it."""
    changes_T = torch.zeros_like(value_T)
    changes_T[1:] = value_T[1:] != value_T[:-1]
    return changes_T.cumsum(0)
