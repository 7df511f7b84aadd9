"""The lazy node table of one tree layer: nodes exist once a gradient reached them; a missing node is a node of zeros.

Legend: G nodes, P out, Q in, r rank.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distcond.ops import NodeTensors, PerLevel, TreePath, first_node
from distcond.table.growth import Admission, Growth, Visits
from distcond.table.random_rows import uniform_rows
from distcond.table.rows import RowStore


def path_node(leaf_G: Tensor, level_G: Tensor, depth: int, num_trees: int) -> Tensor:
    """Id of the node of a level on the path to each leaf, tree << depth | leaf, of trees of this depth, int64."""
    return num_trees * ((torch.ones_like(leaf_G) << level_G) - 1) + (leaf_G >> (depth - level_G))


class NodeTable:
    """Rows of the nodes this rank holds: full ones (weight, bias) and low-rank ones (right, left with the bias).

    Full nodes and left factors are born as zeros; right factors as uniform numbers of variance 1 / in_features, a pure
    function of (seed, node id). Rows are float32.

    out_features: of one tree. num_trees: how many share the table; ids are those of `first_node`. growth: what limits the
    number of nodes; by default nothing does. rows_stay: on the host, wherever the layer goes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        full_depth: int,
        rank: int,
        *,
        seed: int,
        bias: bool,
        num_trees: int = 1,
        growth: Growth | None = None,
        rows_stay: bool = False,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.depth, self.full_depth, self.rank = depth, full_depth, rank
        self.seed, self.has_bias, self.num_trees = seed, bias, num_trees
        self.growth, self.rows_stay = growth or Growth(), rows_stay
        device = torch.device("cpu") if rows_stay else None
        bias_width = out_features if bias else 0
        self.full = RowStore(out_features * in_features + bias_width, device)
        self.low = RowStore(rank * (in_features + out_features) + bias_width, device)
        self._matrices: tuple[Tensor, Tensor, NodeTensors] | None = None
        "The rows, and the same as matrices."
        self.num_updates = 0
        "Steps that were applied: what a forward pass read before one is not what a backward pass would read after it."

    @property
    def num_full_ids(self) -> int:
        """Node ids below this one belong to full nodes."""
        return first_node(self.full_depth + 1, self.num_trees)

    @property
    def num_ids(self) -> int:
        """Number of nodes if every one exists."""
        return first_node(self.depth + 1, self.num_trees)

    def stores(self) -> Iterator[tuple[str, RowStore]]:
        """The two kinds of rows by name; the low-rank one only where levels use it."""
        yield "full", self.full
        if self.full_depth < self.depth:
            yield "low", self.low

    @property
    def num_nodes(self) -> int:
        """Nodes that this rank holds."""
        return sum(store.size for _, store in self.stores())

    @property
    def num_removals(self) -> int:
        """Times that rows were removed: indices from before may be of other nodes now."""
        return self.full.num_removals + self.low.num_removals

    def tensors(self) -> NodeTensors:
        """The rows as matrices; the same objects until rows come or go."""
        full_SW, low_SW = self.full.data, self.low.data
        if torch.is_inference_mode_enabled():  # views made there are of no use outside
            return self.as_matrices(full_SW, low_SW)
        if self._matrices is None or self._matrices[0] is not full_SW or self._matrices[1] is not low_SW:
            self._matrices = full_SW, low_SW, self.as_matrices(full_SW, low_SW)
        return self._matrices[2]

    def tensors_with_zeros(self) -> NodeTensors:
        """The rows as matrices, and behind those of each kind one more, of zeros."""
        return self.as_matrices(self.full.data_with_zeros, self.low.data_with_zeros)

    def as_matrices(self, full_SW: Tensor, low_SW: Tensor) -> NodeTensors:
        """Views of flat rows of both kinds as matrices. Without biases theirs are zeros that nothing reads back."""
        p, q, r, full, low = self.out_features, self.in_features, self.rank, full_SW.shape[0], low_SW.shape[0]
        return NodeTensors(
            weight_SPQ=full_SW[:, : p * q].view(full, p, q),
            bias_SP=full_SW[:, p * q :] if self.has_bias else full_SW.new_zeros(full, p),
            right_SrQ=low_SW[:, : r * q].view(low, r, q),
            left_SxP=low_SW[:, r * q :].view(low, r + self.has_bias, p),
        )

    def find(self, levels: Sequence[Tensor]) -> PerLevel:
        """Row of each node, per level, root first; -1 where it does not exist."""
        return self._by_kind(levels, lambda kind, nodes_G: self._store(kind).find(nodes_G))

    def ensure(self, levels: Sequence[Tensor]) -> PerLevel:
        """Row of each node, per level; nodes that do not exist are born."""
        return self._by_kind(levels, self.ensure_rows)

    def ensure_rows(self, kind: str, nodes_G: Tensor) -> Tensor:
        """Row of each of some distinct nodes of one kind; those that do not exist are born."""
        store = self._store(kind)
        rows_G = store.find(nodes_G)
        is_new_G = rows_G < 0
        new_G = nodes_G[is_new_G]
        if len(new_G):
            rows_G[is_new_G] = torch.arange(store.size, store.size + len(new_G), device=rows_G.device)
            store.append(new_G, self.newborn(kind, new_G) if kind == "low" else None)
        return rows_G

    def deepest_level(self, leaf_G: Tensor) -> Tensor:
        """Level of the deepest node that exists on the path to each leaf, int64; by halving, for no parent is missing."""
        device, leaf_G = leaf_G.device, leaf_G.to(self.full.keys.device)
        least_G, most_G = torch.zeros_like(leaf_G), torch.full_like(leaf_G, self.depth)
        for _ in range(self.depth.bit_length()):
            level_G = (least_G + most_G + 1) >> 1
            nodes_G = path_node(leaf_G, level_G, self.depth, self.num_trees)
            exists_G = torch.maximum(self.full.find(nodes_G), self.low.find(nodes_G)) >= 0
            least_G, most_G = torch.where(exists_G, level_G, least_G), torch.where(exists_G, most_G, level_G - 1)
        return least_G.to(device)

    def stage_new(self, path: TreePath, rows: Sequence[Tensor]) -> None:
        """Count the visits of a backward pass to nodes that it was the first to make, or that others made in this step."""
        if not self.growth.is_limited or not self.growth.takes_paths:
            return
        for number, (level, rows_G) in enumerate(zip(path.levels, rows, strict=True)):
            is_new_G = rows_G >= self._store("full" if number <= self.full_depth else "low").num_settled
            self.growth.stage(Visits(level.nodes_G, level.count_G).to(rows_G.device).where(is_new_G))

    def adopt(self) -> None:
        """Let every node that is there stay, as the whole of the table."""
        for _, store in self.stores():
            store.settle()
        self.growth.num_nodes = self.num_nodes

    def settle(self, admission: Admission | None) -> None:
        """End a step that is applied: nodes that were admitted (None: all that were made for it) stay, others are gone."""
        self.num_updates += 1
        for kind, store in self.stores():
            if admission is None:
                store.settle()
                continue
            is_kind_G = (admission.keys_G < self.num_full_ids) == (kind == "full")
            store.keep_new(admission.keys_G[is_kind_G])
            self.ensure_rows(kind, admission.keys_G[is_kind_G])
            store.settle()
        if admission is not None:
            self.growth.commit(admission)

    def forget_new(self) -> None:
        """End a step that is not applied: what was made and counted for it is gone."""
        self.growth.take_staged()
        for _, store in self.stores():
            store.keep_new(store.keys[:0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": None}

    def _by_kind(self, levels: Sequence[Tensor], look_up: Callable[[str, Tensor], Tensor]) -> PerLevel:
        """What `look_up` says of the nodes, asked once for all levels of a kind, where the rows are."""
        nodes, device = PerLevel.of(levels), self.full.keys.device
        full_N, low_N = nodes.split(self.full_depth + 1)
        rows_N = look_up("full", full_N.to(device))
        if len(low_N):
            rows_N = torch.cat([rows_N, look_up("low", low_N.to(device))])
        return PerLevel(rows_N, nodes.bounds)

    def _store(self, kind: str) -> RowStore:
        return self.full if kind == "full" else self.low

    def newborn(self, name: str, nodes_G: Tensor) -> Tensor:
        """The rows that nodes of a kind start with."""
        store = self._store(name)
        rows_GW = store.data.new_zeros(len(nodes_G), store.width)
        if name == "low":
            size, bound = self.rank * self.in_features, (3.0 / self.in_features) ** 0.5
            rows_GW[:, :size] = uniform_rows(self.seed, nodes_G, size, bound)
        return rows_GW

    def new_gradient(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Uninitialised flat gradient rows for the nodes of the given levels: full ones, low-rank ones (`RowStore`)."""
        full_N, low_N = PerLevel.of(levels).split(self.full_depth + 1)
        return self.full.new_gradient(len(full_N)), self.low.new_gradient(len(low_N))

    def add_gradient(self, rows: Sequence[Tensor], full_GW: Tensor, low_GW: Tensor) -> None:
        """Collect the gradient of nodes, given their rows per level, -1 for those without, laid out as by `new_gradient`."""
        rows = PerLevel.of(rows)
        full_N, low_N = rows.split(self.full_depth + 1)
        if rows.has_missing:
            (full_N, full_GW), (low_N, low_GW) = _existing(full_N, full_GW), _existing(low_N, low_GW)
        self.full.add_gradient(full_N, full_GW)
        if len(low_N):
            self.low.add_gradient(low_N, low_GW)


def _existing(rows_G: Tensor, grad_GW: Tensor) -> tuple[Tensor, Tensor]:
    mask_G = rows_G >= 0
    return rows_G[mask_G], grad_GW[mask_G]
