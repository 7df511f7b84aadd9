"""The path of tokens through a tree on devices other than the CPU: the host waits once, for the numbers of nodes.

Legend: T tokens, K depth, L = K + 1 levels, N nodes touched on all levels.
"""

import torch
from torch import Tensor

from distcond.ops.path import FlatPath, TreePath
from distcond.ops.per_level import PerLevel


def batched_path(leaf_T: Tensor, depth: int, num_trees: int = 1) -> TreePath:
    """`TreePath.of`, in as many calls whatever the depth; it costs O(T K) rather than O(T + nodes)."""
    tokens, device = len(leaf_T), leaf_T.device
    sorted_T, order_T = torch.sort(leaf_T, stable=True)
    place_T = torch.empty_like(order_T).index_copy_(0, order_T, torch.arange(tokens, device=device))
    level_L1 = torch.arange(depth + 1, device=device)[:, None]
    prefix_LT = sorted_T >> (depth - level_L1)
    is_first_LT = torch.ones_like(prefix_LT, dtype=torch.bool)
    is_first_LT[:, 1:] = prefix_LT[:, 1:] != prefix_LT[:, :-1]
    number_LT = is_first_LT.flatten().cumsum(0).view(depth + 1, tokens) - 1
    bounds = [0, *((number_LT[:, -1] + 1).tolist() if tokens else [0] * (depth + 1))]
    # Nodes begin where their first token stands in [L, T]; tokens that are no first ones write behind the last node.
    number, end = number_LT.flatten(), bounds[-1]
    place = torch.arange(len(number), device=device)
    begin_N = leaf_T.new_empty(end + 1).scatter_(0, torch.where(is_first_LT.flatten(), number, end), place)
    begin_N[end] = len(number)
    count_N, begin_N = begin_N.diff(), begin_N[:end]
    nodes_N = (prefix_LT + num_trees * ((1 << level_L1) - 1)).flatten().index_select(0, begin_N)
    above = (number_LT - number_LT[:, :1]).flatten()
    parent_N = above.index_select(0, (begin_N - tokens).clamp(min=0))
    nodes, parents, counts = (PerLevel(part_N, bounds) for part_N in (nodes_N, parent_N, count_N))
    start_N = begin_N % tokens if tokens else begin_N
    return TreePath(order_T, place_T, None, FlatPath(torch.tensor(bounds), start_N, nodes, parents, counts), number_LT)
