"""What the tree product works on: nodes as matrices, tokens sorted by leaf, and how each level is to be computed.

Legend: T tokens, Q in, P out, K depth, r rank, G nodes touched on a level, S rows stored.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from distcond.ops.per_level import PerLevel

TOKENS_PER_MERGED_NODE = 8
"""Mean tokens a node from which on its matrix is added to its ancestors' and multiplied once.

Adding it, once forward and once backward, spares two products of each of its tokens; both read it from memory once."""
TOKENS_PER_BATCHED_NODE = 4
"""The same where the nodes of a level are computed together (`batched`). Measured on an H100, depth 4 to 10, width 256 and 512:
in fp32 merging down to 8 tokens a node takes 0.6 to 0.8 times as long as merging nothing, to 2 tokens 0.95 times as long."""
GROUPED_NODE_S = 30e-6
"Forward and backward of a low-rank node on its own: a dozen calls."
GATHERED_TOKEN_S, GATHERED_NUMBER_S = 2e-6, 2.6e-9
"Forward and backward of one token with a copy of a low-rank node, and of each number of that."


class NodeTensors(NamedTuple):
    """Nodes of both kinds; a row index means the same in all tensors of its kind. A low-rank weight is left^T @ right."""

    weight_SPQ: Tensor
    bias_SP: Tensor
    right_SrQ: Tensor
    left_SxP: Tensor
    "x = r, or r + 1 where nodes have a bias: the last row, as if a hidden unit were always 1."

    @property
    def low_numbers(self) -> int:
        """Numbers in a low-rank node."""
        return self.right_SrQ.shape[1:].numel() + self.left_SxP.shape[1:].numel()


def first_node(level: int, num_trees: int = 1) -> int:
    """Id of the first node of a level. Ids follow level by level, in a level tree by tree: heap order where there is one tree.

    The roots are 0 to num_trees - 1, the children of n are 2 n + num_trees and the next one.
    """
    return int(num_trees * (2**level - 1))


@dataclass
class Level:
    """The nodes of one level that tokens visit, in the order of the sorted tokens."""

    nodes_G: Tensor
    "int64, ascending: `first_node` of the level + (tree << level) + prefix."
    parent_G: Tensor
    "int64, index of each node's parent among the nodes of the level above; of no meaning for roots."
    count_G: Tensor
    "int64, tokens of each node: lengths of the runs of sorted tokens."

    @functools.cached_property
    def sizes(self) -> list[int]:
        """`count_G` as numbers."""
        return self.count_G.tolist()

    def per_token(self, values_G: Tensor, num_tokens: int | None = None) -> Tensor:
        """A value of each node as one of each sorted token, [T]. num_tokens: T; where it is not given, a device is waited for."""
        return torch.repeat_interleave(values_G, self.count_G, output_size=num_tokens)


class FlatPath(NamedTuple):
    """The nodes of all levels one after the other, the root first."""

    bounds: Tensor
    "int64 [K + 2], on the CPU: where each level begins, and the end."
    start_N: Tensor
    "int64, first sorted token of each node."
    nodes: PerLevel
    parents: PerLevel
    counts: PerLevel
    "What `Level` calls nodes_G, parent_G, count_G."


@dataclass
class TreePath:
    """Tokens sorted by leaf, and the nodes they pass on every level. In a forest, a token here is one for each of its trees."""

    order_T: Tensor
    "int64, sorted position -> token."
    place_T: Tensor
    "int64, token -> sorted position."
    known_levels: list[Level] | None
    known_flat: FlatPath | None = None
    "The same nodes; one of the two is given, and the other made of it when it is first asked for."
    number_LT: Tensor | None = None
    "int64, node of each sorted token on each level, among those of all levels; None where the path was found without it."
    kept_sums: list[tuple[slice, Tensor, Tensor]] | None = None
    "Sums of matrices and biases that a forward pass leaves for the backward pass (`fused`)."

    @classmethod
    def of(cls, leaf_T: Tensor, depth: int, num_trees: int = 1) -> "TreePath":
        """Path of int64 leaf indices in [0, num_trees * 2**depth): tree << depth | leaf."""
        sorted_T, order_T = torch.sort(leaf_T, stable=True)
        prefix_G, counts_G = torch.unique_consecutive(sorted_T, return_counts=True)
        levels: list[Level] = []
        for level in range(depth, -1, -1):
            up_G, parent_G, up_sizes = torch.unique_consecutive(prefix_G >> 1, return_inverse=True, return_counts=True)
            levels.append(Level(nodes_G=prefix_G + first_node(level, num_trees), parent_G=parent_G, count_G=counts_G))
            counts_G = torch.zeros_like(up_sizes).index_add_(0, parent_G, counts_G)
            prefix_G = up_G
        place_T = torch.empty_like(order_T).index_copy_(0, order_T, torch.arange(len(order_T), device=order_T.device))
        return cls(order_T, place_T, levels[::-1])

    def in_order(self, x_TQ: Tensor) -> Tensor:
        """Rows sorted by leaf, [T, Q]. Of fewer rows than tokens, each serves as many tokens that follow each other."""
        return x_TQ.index_select(0, self.source(len(x_TQ)))

    def source(self, num_rows: int) -> Tensor:
        """Sorted position -> row of so many, int64 [T]."""
        trees = len(self.order_T) // max(1, num_rows)
        return self.order_T if trees == 1 else self.order_T // trees

    def per_token(self, values: Sequence[Tensor]) -> Tensor:
        """Values of the nodes of the last levels, as values of sorted tokens, [T, L]."""
        levels = self.levels[len(self.levels) - len(values) :]
        pairs = zip(values, levels, strict=True)
        return torch.stack([level.per_token(values_G, len(self.order_T)) for values_G, level in pairs], dim=1)

    def slots_per_token(self, slots: Sequence[slice]) -> Tensor:
        """`gradient_rows` of the last levels, as the row of each sorted token, int64 [T, L]."""
        return self.per_token([torch.arange(slot.start, slot.stop, device=self.order_T.device) for slot in slots])

    @property
    def levels(self) -> list[Level]:
        """K + 1 levels, the roots first."""
        if self.known_levels is None:
            flat = self.flat()
            self.known_levels = [Level(*parts) for parts in zip(flat.nodes, flat.parents, flat.counts, strict=True)]
        return self.known_levels

    @functools.cached_property
    def nodes(self) -> PerLevel:
        """Ids of the nodes, as those of the levels."""
        return PerLevel.of([level.nodes_G for level in self.levels]) if self.known_flat is None else self.known_flat.nodes

    @property
    def depth(self) -> int:
        """K."""
        return len(self.nodes) - 1

    def last_level(self) -> tuple[Tensor, Tensor]:
        """nodes_G and count_G of the last level."""
        if self.known_flat is None:
            return self.levels[-1].nodes_G, self.levels[-1].count_G
        return self.known_flat.nodes[-1], self.known_flat.counts[-1]

    def flat(self) -> FlatPath:
        """The same nodes as one list."""
        if self.known_flat is None:
            start_N = torch.cat([level.count_G.cumsum(0) - level.count_G for level in self.levels])
            parents = PerLevel.of([level.parent_G for level in self.levels])
            counts = PerLevel.of([level.count_G for level in self.levels])
            self.known_flat = FlatPath(torch.tensor(self.nodes.bounds), start_N, self.nodes, parents, counts)
        return self.known_flat


@dataclass(frozen=True, slots=True)
class Schedule:
    """How each level is computed; the result is the same but for rounding. Levels 0 <= merged <= full_depth < gathered."""

    full_depth: int
    "Deepest level of full matrices."
    merged: int
    "Levels up to this one are added into one matrix a node, for one product of each token."
    gathered: int
    "Levels from this one on copy their nodes for each token; those between are computed node by node."

    @classmethod
    def of(cls, path: TreePath, full_depth: int, nodes: NodeTensors) -> "Schedule":
        """The fastest for these tokens, by figures of one core of 2 to 3 GHz; it depends on shapes alone, not on clocks.

        Figures of the machine at hand would gain little. For 15 shapes (depth 4 to 20, 512 to 8,192 tokens, width 64 to 512,
        forward and backward on one core), beside schedules with more or fewer merged or gathered levels, this one took 1.01
        times as long as the best in the median, 1.26 at worst, where three low-rank levels had better been gathered.
        """
        tokens, depth = len(path.order_T), path.depth
        touched = path.nodes.sizes
        is_cpu = calls_are_cheap(path.order_T)
        merged, enough = 0, TOKENS_PER_MERGED_NODE if is_cpu else TOKENS_PER_BATCHED_NODE
        while merged < full_depth and tokens >= enough * touched[merged + 1]:
            merged += 1
        if not is_cpu:
            return cls(full_depth, merged, gathered=full_depth + 1)
        copies_s = tokens * (GATHERED_TOKEN_S + GATHERED_NUMBER_S * nodes.low_numbers)
        gathered = full_depth + 1
        while gathered <= depth and touched[gathered] * GROUPED_NODE_S <= copies_s:
            gathered += 1
        return cls(full_depth, merged, gathered)


def calls_are_cheap(tensor: Tensor) -> bool:
    """Whether a call costs little where a tensor is: on a CPU. There nodes are computed one by one, elsewhere as in `batched`."""
    return tensor.device.type == "cpu"


def factor_dtype(x_dtype: torch.dtype, nodes: NodeTensors) -> torch.dtype:
    """Precision of tokens when they are multiplied: that of the rows or, where trees are batched, a shorter one of their own."""
    own = nodes.weight_SPQ.dtype
    return own if calls_are_cheap(nodes.weight_SPQ) or x_dtype.itemsize >= own.itemsize else x_dtype


def gradient_rows(rows: Sequence[Tensor], full_depth: int) -> list[slice]:
    """Rows of each level in a gradient, in which the nodes of all levels of a kind follow each other."""
    kinds = (rows[: full_depth + 1], rows[full_depth + 1 :])
    return [slice(*ends) for kind in kinds for ends in pairwise(accumulate((len(rows_G) for rows_G in kind), initial=0))]


def scaled(level_TP: Tensor, scale_TK: Tensor | None, number: int) -> Tensor:
    """What a level has for each token times its factor; without factors, and for the roots, that is 1."""
    return level_TP if scale_TK is None or number == 0 else level_TP * scale_TK[:, number - 1 : number]


def scale_from(scale_TK: Tensor | None, level: int) -> Tensor | None:
    """The factors of the levels from one on."""
    return None if scale_TK is None else scale_TK[:, level - 1 :]


def pick(tensor_S: Tensor, rows_G: Tensor) -> list[Tensor | None]:
    """Views of single rows, None where the row is -1."""
    return [None if row < 0 else tensor_S[row] for row in rows_G.tolist()]
