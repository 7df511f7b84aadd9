"""TreeLinear: a linear layer whose weight is the sum of the matrices on a path through a binary tree.

The path is chosen by sign bits of gating units (Cho & Bengio 2014, arXiv 1406.7362):
W(b) = U_root + sum_l U_{b_1..b_l}; 2**K leaves, K + 1 matrices touched.

Legend: T tokens, V of them for each tree (a token's trees follow each other), M trees, Q in, P out, K depth (bits), S nodes,
G nodes touched.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distcond.nn.gate_gradients import flip_levels, learn_from_flips, product_levels, soft_bits
from distcond.nn.gates import Gate, pooled
from distcond.nn.tree_input import as_rows
from distcond.nn.tree_nodes import add_parameters, dense_node
from distcond.nn.tree_options import ROWS_IN_DDP, check_growth, check_options, check_place
from distcond.nn.tree_product import ANCHOR, TreeProduct, full_precision, in_one_piece, takes_flips
from distcond.nn.tree_state import load_rows, move_rows, row_names, save_rows
from distcond.ops import NodeTensors, TreePath, count_nonfinite, first_node, leaf_index, tree_leaf
from distcond.table import Collective, Growth, NodeTable, SubtreeLoads, SubtreePlan, Visits


class TreeLinear(nn.Module):
    """Linear layer with 2**depth weights, of which each input picks one by its bits.

    depth: K, 0 to 62; 0 is exactly `nn.Linear`.
    full_depth, rank: levels up to full_depth hold full matrices (None: all), deeper ones factors of this rank.
    gate: "linear" (learned units), "hash" (fixed random hyperplanes) or "sign" (the first num_trees x depth inputs
        themselves; what the gates would learn passes into these inputs).
    gate_gradient: "straight_through": level l's contribution is multiplied by 1 + t - stopgrad(t), t = tanh|g_l|;
        "sampled": the same, but of the full levels one a step, in turn, times their number: right on average, and it spares
        a product for each of them (low-rank levels have theirs at hand);
        "flip": as if the output moved with tanh(g_l) / 2 from what it is to what it were with bit l flipped and the bits
        below it as they are; one more forward product a level. "flip_sampled": of one level a step, in turn, times depth.
        "magnitude": level l's contribution is multiplied by tanh|g_l| itself, an ordinary gradient: the layer is continuous
        in its gates, but no longer one matrix a leaf; "none": the gates do not learn.
    storage: "dense": `nn.Parameter`s of all nodes, any torch optimiser trains them. "lazy": rows that are born with
        their first gradient, trained by `distcond.optim.RowAdam`, sharded by `distcond.initialize`. Any plain `backward()`
        reaches them; `torch.autograd.grad` and `backward(inputs=...)`, which name what they reach, do not. "host": the same, but
        rows and what the optimiser keeps of them stay in host memory wherever the layer is; touched rows travel to it.
    num_trees: the outputs are split into this many groups, each with a tree and bits of its own; divides out_features.
    bias: whether nodes carry a bias, summed along the path like the weights.
    min_visits, max_nodes: lazy: tokens that a node is asked for before it exists (1: whole paths come at once; more: one level
        at a time), and the most nodes, over all ranks, the root included (None: no limit). Missing nodes are zeros.

    Nodes below the root start at zero, so a new layer computes its root's linear function.
    Raises ValueError for options outside these ranges.
    """

    seed: Tensor
    weight: Tensor
    bias: Tensor
    right: Tensor
    left: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        full_depth: int | None = None,
        rank: int | None = None,
        gate: str = "linear",
        gate_gradient: str = "straight_through",
        storage: str = "dense",
        num_trees: int = 1,
        bias: bool = True,
        min_visits: int = 1,
        max_nodes: int | None = None,
    ) -> None:
        super().__init__()
        full_depth = depth if full_depth is None else full_depth
        check_options(in_features, out_features, depth, full_depth, rank, gate_gradient, storage, num_trees)
        check_growth(storage, min_visits, max_nodes, num_trees)
        self.in_features, self.out_features, self.depth, self.num_trees = in_features, out_features, depth, num_trees
        self.full_depth, self.rank = full_depth, rank or 1
        self.gate_gradient, self.storage, self.has_bias = gate_gradient, storage, bias
        self.scales_levels = gate_gradient == "magnitude" and depth > 0
        root = nn.Linear(in_features, out_features, bias=bias)
        self.gate = Gate(in_features, num_trees * depth, gate, learns=gate_gradient != "none") if depth else None
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.plan = SubtreePlan.make(depth, 1, num_trees=num_trees)
        self.collective: Collective | None = None
        self.commits_by_itself = storage == "dense"
        self.subtree_loads: SubtreeLoads | None = None
        self.records_loads = self.records_touched = False
        self.trains_rows = True
        self._touched: list[Tensor] = []
        self._leaf_loads: list[Visits] = []
        self._nonfinite: Tensor | int = 0
        self.layout = NodeTable(
            in_features,
            out_features // num_trees,
            depth,
            full_depth,
            self.rank,
            seed=int(self.seed),
            bias=bias,
            num_trees=num_trees,
            growth=Growth(min_visits, max_nodes),
            rows_stay=storage == "host",
        )
        self.table = None if storage == "dense" else self.layout
        if self.table is None:
            add_parameters(self, self.layout)
        self.set_root(root.weight, root.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, depth: int, **options: Any) -> Self:
        """A tree that computes the same function as `linear`, with its weights at the root and room to grow."""
        layer = cls(linear.in_features, linear.out_features, depth, bias=linear.bias is not None, **options)
        layer.to(linear.weight)
        layer.set_root(linear.weight, linear.bias)
        return layer

    @in_one_piece
    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]. Under a sharded plan this is a collective call.

        Rows with a NaN or infinite gate are counted (`take_nonfinite`); under `torch.autograd.detect_anomaly()`, NaN or
        infinite inputs raise ValueError.
        """
        x_TQ = as_rows(x, self.in_features)
        self._before_forward()
        with full_precision(x):  # bits and rows are fp32 whatever the model computes in
            gates_TMK = self._gates(x_TQ)
            if not _is_recomputing():
                self._nonfinite = self._nonfinite + count_nonfinite(gates_TMK)
            leaf_V = tree_leaf(gates_TMK)
            nodes = self.node_parameters() if self.table is None else (ANCHOR,) * self.trains_rows
            learns = torch.is_grad_enabled() and gates_TMK.requires_grad
            flips = flip_levels(self.gate_gradient, self.depth, self._turn()) if learns else []
            own, apart = (flips, []) if flips and takes_flips(self, x_TQ, nodes) else ([], flips)
            soft_VK = soft_bits(self.gate_gradient, gates_TMK, self.full_depth, own).flatten(0, 1)
            statistics = self.gate.statistics(gates_TMK.flatten(1)) if self.gate is not None and self.training else None

            def output_of(leaf_V: Tensor) -> Tensor:
                y_VP: Tensor = TreeProduct.apply(self, statistics, own, x_TQ, soft_VK, leaf_V, *nodes)  # type: ignore[no-untyped-call]
                return y_VP

            y_VP = learn_from_flips(output_of(leaf_V), gates_TMK.flatten(0, 1), leaf_V, apart, output_of)
        return y_VP.reshape(*x.shape[:-1], self.out_features)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of any module, and of a lazy table, which is no parameter: of those in a model, `model.apply` this to each."""
        self.trains_rows = requires_grad
        return super().requires_grad_(requires_grad)

    @torch.no_grad()
    def gates(self, x: Tensor) -> Tensor:
        """What the bits are the signs of, fp32 [..., num_trees, depth]: how far each is from its threshold."""
        with full_precision(x):
            return self._gates(as_rows(x, self.in_features)).view(*x.shape[:-1], self.num_trees, self.depth)

    def codes(self, x: Tensor) -> Tensor:
        """The bits, bool [..., num_trees, depth]; the first is the coarsest."""
        return self.gates(x) > 0

    @torch.no_grad()
    def leaf(self, x: Tensor) -> Tensor:
        """Index of the leaf of each tree, int64 [..., num_trees] in [0, 2**depth); the first bit is the most significant."""
        return leaf_index(self.codes(x))

    @torch.no_grad()
    def node_weight(self, node_id: int, tree: int = 0) -> Tensor:
        """Matrix of one node in heap order (its tree's root is 0), [out / num_trees, in], zeros where this rank has none."""
        return self._node(node_id, tree)[0]

    @torch.no_grad()
    def node_bias(self, node_id: int, tree: int = 0) -> Tensor:
        """Bias of one node, [out / num_trees], as `node_weight`."""
        return self._node(node_id, tree)[1]

    @torch.no_grad()
    def effective_weight(self, leaf: int, tree: int = 0) -> tuple[Tensor, Tensor]:
        """W(b) [out / num_trees, in] and c(b) of a leaf of a tree, each level counted in full whatever the gate gradient."""
        leaf = check_place("leaf", leaf, 2**self.depth)
        nodes = [self._node(2**level - 1 + (leaf >> (self.depth - level)), tree) for level in range(self.depth + 1)]
        return sum((w for w, _ in nodes[1:]), nodes[0][0]), sum((c for _, c in nodes[1:]), nodes[0][1])

    @property
    def num_materialized(self) -> int:
        """Nodes that exist (lazy: on this rank)."""
        return self.layout.num_ids if self.table is None else self.table.num_nodes

    @torch.no_grad()
    def set_root(self, weight: Tensor, bias: Tensor | None) -> None:
        """Give a new layer the matrix [out, in] and bias [out] of a linear layer; nodes below the root are zeros or not there."""
        weight_MPQ = weight.unflatten(0, (self.num_trees, -1))
        bias_MP = None if bias is None else bias.unflatten(0, (self.num_trees, -1))
        if self.table is not None:
            flat_MW = weight_MPQ.flatten(1) if bias_MP is None else torch.cat([weight_MPQ.flatten(1), bias_MP], dim=1)
            store = self.table.full
            store.replace(self._trees().to(store.keys.device), flat_MW.to(store.data))
            self.table.growth.num_nodes = self.num_trees
            return
        self.weight[: self.num_trees] = weight_MPQ
        if bias_MP is not None:
            self.bias[: self.num_trees] = bias_MP

    def shard(self, plan: SubtreePlan, collective: Collective) -> None:
        """Keep only this rank's nodes of a lazy table and exchange tokens with the other ranks from now on."""
        assert self.table is not None, "only lazy tables are sharded"
        self.plan, self.collective = plan, collective
        self.keep_own(collective.rank)

    def keep_own(self, rank: int) -> None:
        """Keep what belongs to a rank, of the rows of a lazy table and of the visits that are counted."""
        assert self.table is not None
        for _, store in self.table.stores():
            store.keep(self._is_held(store.keys, rank))
        growth = self.table.growth
        growth.visits = growth.visits.where(self._is_held(growth.visits.keys_G, rank))

    def _is_held(self, keys_G: Tensor, rank: int) -> Tensor:
        owner_G = self.plan.node_owner(keys_G)
        return (owner_G < 0) | (owner_G == rank)

    def commit_statistics(self) -> None:
        """Fold the staged gate statistics into the running mean; once per applied step."""
        if self.gate is not None:
            self.gate.commit(pooled(self.gate.take_statistics()))

    def take_touched(self) -> Tensor:
        """Ids of the nodes that tokens were routed to since the last call, ascending int64 (dense storage)."""
        touched, self._touched = self._touched, []
        return torch.unique(torch.cat(touched)) if touched else self.seed.new_empty(0)

    def take_leaf_loads(self) -> Visits:
        """Leaves this rank served in training since the last call, and their tokens, int64 [G] each.

        Leaves are tree << depth | leaf, ascending.
        """
        loads, self._leaf_loads = self._leaf_loads, []
        return Visits.join(loads) if loads else Visits.none(self.seed.device)

    def take_nonfinite(self) -> int:
        """Rows with a gate that was NaN or infinite, in passes of any kind since the last call: no leaf is theirs."""
        number, self._nonfinite = int(self._nonfinite), 0
        return number

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, depth={self.depth}, "
            f"full_depth={self.full_depth}, rank={self.rank}, storage={self.storage}, num_trees={self.num_trees}, "
            f"materialized={self.num_materialized}"
        )

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def node_parameters(self) -> tuple[Tensor, ...]:
        """Weight, bias, right and left of all nodes where they are parameters (dense storage); none where a table holds them."""
        return () if self.table is not None else (self.weight, self.bias, self.right, self.left)

    def _node(self, node_id: int, tree: int = 0) -> tuple[Tensor, Tensor]:
        node_id, tree = check_place("node_id", node_id, 2 ** (self.depth + 1) - 1), check_place("tree", tree, self.num_trees)
        level = (node_id + 1).bit_length() - 1
        key = first_node(level, self.num_trees) + (tree << level) + node_id - first_node(level)
        nodes = self.node_tensors(tuple(parameter.detach() for parameter in self.node_parameters()))
        return dense_node(key, nodes, self.layout, self.table)

    def node_tensors(self, parameters: tuple[Tensor, ...]) -> NodeTensors:
        """The stored nodes as matrices, from the table or from the given parameters."""
        if self.table is not None:
            return self.table.tensors()
        weight, bias, right, left = (parameter.contiguous() for parameter in parameters)
        return NodeTensors(weight, bias if self.has_bias else weight.new_zeros(weight.shape[:2]), right, left)

    # ---- gates and statistics ----------------------------------------------------------------------------------------

    def _trees(self) -> Tensor:
        """0 to num_trees - 1, which are also the ids of the roots, int64 [M]."""
        return torch.arange(self.num_trees, device=self.seed.device)

    def _gates(self, x_TQ: Tensor) -> Tensor:
        """Centred pre-activations of each tree's gates, [T, M, K]."""
        if self.gate is None:
            return x_TQ.new_zeros(len(x_TQ), self.num_trees, 0)
        gates_TMK: Tensor = self.gate(x_TQ).unflatten(1, (self.num_trees, self.depth))
        return gates_TMK

    def _before_forward(self) -> None:
        if not self.training or _is_recomputing():
            return
        in_ddp, learns = DistributedDataParallel._get_active_ddp_module() is not None, torch.is_grad_enabled()
        if in_ddp and learns and (self.table is not None or self.records_touched):
            raise RuntimeError(ROWS_IN_DDP)
        # Activation checkpointing may compute without a gradient; so does a rank for itself, which must not wait for others.
        if self.gate is not None and self.gate.is_due and (learns or in_ddp or not dist.is_initialized()):
            self.commit_statistics()

    def gate_levels(self) -> list[int]:
        """Levels whose gates learn from this pass through the product, ascending."""
        return product_levels(self.gate_gradient, self.depth, self.full_depth, self._turn())

    def _turn(self) -> int:
        """A number that counts steps, the same on all ranks and after a restart."""
        is_needed = self.gate is not None and self.gate_gradient in {"sampled", "flip_sampled"}
        return int(self.seed) + int(self.gate.num_commits) if self.gate is not None and is_needed else 0

    def note_backward(self, path: TreePath, loads: Visits, statistics: Tensor | None) -> None:
        """Record what a backward pass reached: once for each forward, however often that is computed again."""
        if self.gate is not None and statistics is not None:
            self.gate.stage(statistics)
            self.gate.is_due = self.commits_by_itself
        if self.records_touched:
            self._touched.append(path.nodes.flat_N)
        if self.subtree_loads is not None:
            self.subtree_loads.stage(loads, self.plan)
        if self.records_loads:
            self._leaf_loads.append(loads)

    # ---- the rows travel with the module -----------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Tables, and where gradients of rows are made, follow to another device, and to fp64; never below fp32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        move_rows(self.layout, fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_rows(self.table, destination, prefix)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        names = row_names(self.table, prefix)
        own = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, unexpected, errors)
        missing.extend(sorted(names - state_dict.keys()) if strict else [])
        load_rows(self.table, state_dict, prefix, errors)
        if self.table is not None:
            self.table.seed = int(self.seed)
            if self.collective is not None:
                self.keep_own(self.collective.rank)


def _is_recomputing() -> bool:
    """Whether a backward pass computes a forward pass again, under activation checkpointing."""
    return torch._C._current_graph_task_id() != -1
