"""TreeLinear: a linear layer whose weight is the sum of the matrices on a path through a binary tree.

The path is chosen by sign bits of gating units (Cho & Bengio 2014, arXiv 1406.7362):
W(b) = U_root + sum_l U_{b_1..b_l}; 2**K leaves, K + 1 matrices touched.

Legend: T tokens, Q in, P out, K depth (bits), S nodes, G nodes touched.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distcond.nn.gates import Gate, leaf_index
from distcond.nn.tree_input import as_rows, count_nonfinite
from distcond.nn.tree_nodes import dense_node
from distcond.nn.tree_options import check_options
from distcond.nn.tree_product import TreeProduct, anchor
from distcond.nn.tree_state import load_rows, move_rows, row_names, save_rows
from distcond.ops import NodeTensors, TreePath
from distcond.table import Collective, NodeTable, RowStore, SubtreePlan


class TreeLinear(nn.Module):
    """Linear layer with 2**depth weights, of which each input picks one by its bits.

    depth: K, 0 to 62; 0 is exactly `nn.Linear`.
    full_depth, rank: levels up to full_depth hold full matrices (None: all), deeper ones factors of this rank.
    gate: "linear" (learned units), "hash" (fixed random hyperplanes) or "sign" (the first `depth` inputs themselves; what
        the gates would learn passes into these inputs).
    gate_gradient: "straight_through": level l's contribution is multiplied by 1 + t - stopgrad(t), t = tanh|g_l|;
        "sampled": the same, but of the full levels one a step, in turn, times their number: right on average, and it spares
        a product for each of them (low-rank levels have theirs at hand);
        "magnitude": level l's contribution is multiplied by tanh|g_l| itself, an ordinary gradient: the layer is continuous
        in its gates, but no longer one matrix a leaf; "none": the gates do not learn.
    storage: "dense": `nn.Parameter`s of all nodes, any torch optimiser trains them. "lazy": rows that are born with
        their first gradient, trained by `distcond.optim.RowAdam`, sharded by `distcond.initialize`.
    bias: whether nodes carry a bias, summed along the path like the weights.

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
        bias: bool = True,
    ) -> None:
        super().__init__()
        full_depth = depth if full_depth is None else full_depth
        check_options(in_features, out_features, depth, full_depth, rank, gate_gradient, storage)
        self.in_features, self.out_features, self.depth = in_features, out_features, depth
        self.full_depth, self.rank = full_depth, rank or 1
        self.gate_gradient, self.storage, self.has_bias = gate_gradient, storage, bias
        self.scales_levels = gate_gradient == "magnitude" and depth > 0
        root = nn.Linear(in_features, out_features, bias=bias)
        self.gate = Gate(in_features, depth, gate, learns=gate_gradient != "none") if depth else None
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.plan = SubtreePlan.make(depth, 1)
        self.collective: Collective | None = None
        self.commits_by_itself = storage == "dense"
        self.records_loads = False
        self.records_touched = False
        self._backward_seen = False
        self._touched: list[Tensor] = []
        self._leaf_loads: list[tuple[Tensor, Tensor]] = []
        self._nonfinite = torch.zeros((), dtype=torch.int64)
        self.layout = NodeTable(in_features, out_features, depth, full_depth, self.rank, seed=int(self.seed), bias=bias)
        self.table = self.layout if storage == "lazy" else None
        if self.table is None:
            self._make_parameters()
        self._set_root(root.weight, root.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, depth: int, **options: Any) -> Self:
        """A tree that computes the same function as `linear`, with its weights at the root and room to grow."""
        layer = cls(linear.in_features, linear.out_features, depth, bias=linear.bias is not None, **options)
        layer.to(linear.weight)
        layer._set_root(linear.weight, linear.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]. Under a sharded plan this is a collective call.

        Rows with a NaN or infinite gate are counted (`take_nonfinite`); under `torch.autograd.detect_anomaly()`, NaN or
        infinite inputs raise ValueError.
        """
        x_TQ = as_rows(x, self.in_features)
        self._before_forward()
        with torch.autocast(x.device.type, enabled=False):  # bits and rows are fp32 whatever the model computes in
            gates_TK = self._gates(x_TQ)
            if not _is_recomputing():
                self._nonfinite = self._nonfinite + count_nonfinite(gates_TK)
            leaf_T = leaf_index(gates_TK > 0)
            soft_TK = self._soft_bits(gates_TK)
            nodes = self._parameters_of_nodes() if self.table is None else (anchor(x_TQ),)
            statistics = self.gate.statistics(gates_TK) if self.gate is not None and self.training else None
            y_TP: Tensor = TreeProduct.apply(self, statistics, x_TQ, soft_TK, leaf_T, *nodes)  # type: ignore[no-untyped-call]
        return y_TP.reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The bits, bool [..., 1, depth]; the first is the coarsest. The axis before the last counts trees."""
        with torch.autocast(x.device.type, enabled=False):
            gates_TK = self._gates(as_rows(x, self.in_features))
        return (gates_TK > 0).view(*x.shape[:-1], 1, self.depth)

    @torch.no_grad()
    def leaf(self, x: Tensor) -> Tensor:
        """Index of the leaf, int64 [..., 1] in [0, 2**depth); the first bit is the most significant."""
        return leaf_index(self.codes(x))

    @torch.no_grad()
    def node_weight(self, node_id: int) -> Tensor:
        """Matrix of one node, [out, in], zeros where it does not exist on this rank; ids in heap order, the root 0."""
        return self._node(node_id)[0]

    @torch.no_grad()
    def effective_weight(self, leaf: int) -> tuple[Tensor, Tensor]:
        """W(b) [out, in] and c(b) [out] of a leaf, each level counted in full whatever the gate gradient."""
        nodes = [self._node(2**level - 1 + (leaf >> (self.depth - level))) for level in range(self.depth + 1)]
        return sum((w for w, _ in nodes[1:]), nodes[0][0]), sum((c for _, c in nodes[1:]), nodes[0][1])

    @property
    def num_materialized(self) -> int:
        """Nodes that exist (lazy: on this rank)."""
        return 2 ** (self.depth + 1) - 1 if self.table is None else sum(store.size for _, store in self.table.stores())

    def shard(self, plan: SubtreePlan, collective: Collective) -> None:
        """Keep only this rank's nodes of a lazy table and exchange tokens with the other ranks from now on."""
        assert self.table is not None, "only lazy tables are sharded"
        self.plan, self.collective = plan, collective
        for _, store in self.table.stores():
            self._keep_own(store)

    def _keep_own(self, store: RowStore) -> None:
        if self.collective is not None:
            owner = self.plan.node_owner(store.keys)
            store.keep((owner < 0) | (owner == self.collective.rank))

    def commit_statistics(self) -> None:
        """Fold the staged gate statistics into the running mean; once per applied step."""
        if self.gate is not None:
            self.gate.commit(self.gate.take_statistics())

    def take_touched(self) -> Tensor:
        """Ids of the nodes that tokens were routed to since the last call, ascending int64 (dense storage)."""
        touched, self._touched = self._touched, []
        return torch.unique(torch.cat(touched)) if touched else self.seed.new_empty(0)

    def take_leaf_loads(self) -> tuple[Tensor, Tensor]:
        """Leaves this rank served in training since the last call, int64 [G] ascending, and their tokens, int64 [G]."""
        loads, self._leaf_loads = self._leaf_loads, []
        if not loads:
            return self.seed.new_empty(0), self.seed.new_empty(0)
        leaf_G, index = torch.unique(torch.cat([leaf for leaf, _ in loads]), return_inverse=True)
        return leaf_G, torch.zeros_like(leaf_G).index_add_(0, index, torch.cat([count for _, count in loads]))

    def take_nonfinite(self) -> int:
        """Rows with a gate that was NaN or infinite, in passes of any kind since the last call: no leaf is theirs."""
        number, self._nonfinite = int(self._nonfinite), torch.zeros_like(self._nonfinite)
        return number

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, depth={self.depth}, "
            f"full_depth={self.full_depth}, rank={self.rank}, storage={self.storage}, materialized={self.num_materialized}"
        )

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def _make_parameters(self) -> None:
        full, nodes = self.layout.num_full_ids, 2 ** (self.depth + 1) - 1
        low = self.layout.newborn("low", torch.arange(full, nodes))
        fresh = self.layout.as_matrices(self.layout.full.data, low)
        self._register("weight", torch.zeros(full, self.out_features, self.in_features))
        self._register("bias", torch.zeros(full if self.has_bias else 0, self.out_features))
        self._register("right", fresh.right_SrQ.clone())
        self._register("left", fresh.left_SxP.clone())

    def _register(self, name: str, value: Tensor) -> None:
        if value.numel():
            self.register_parameter(name, nn.Parameter(value))
        else:  # NOTE: ZeRO 3 cannot gather a parameter without numbers
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def _set_root(self, weight: Tensor, bias: Tensor | None) -> None:
        if self.table is not None:
            flat = weight.flatten() if bias is None else torch.cat([weight.flatten(), bias])
            self.table.full.replace(self.seed.new_zeros(1), flat[None].to(self.table.full.data.dtype))
            return
        self.weight[0] = weight
        if bias is not None:
            self.bias[0] = bias

    def _parameters_of_nodes(self) -> tuple[Tensor, ...]:
        return () if self.table is not None else (self.weight, self.bias, self.right, self.left)

    def _node(self, node_id: int) -> tuple[Tensor, Tensor]:
        return dense_node(node_id, self.node_tensors(self._parameters_of_nodes()), self.layout, self.table)

    def node_tensors(self, parameters: tuple[Tensor, ...]) -> NodeTensors:
        """The stored nodes as matrices, from the table or from the given parameters."""
        if self.table is not None:
            return self.table.tensors()
        weight, bias, right, left = parameters
        return NodeTensors(weight, bias if self.has_bias else weight.new_zeros(weight.shape[:2]), right, left)

    # ---- gates and statistics ----------------------------------------------------------------------------------------

    def _gates(self, x_TQ: Tensor) -> Tensor:
        if self.gate is None:
            return x_TQ.new_zeros(len(x_TQ), 0)
        return self.gate(x_TQ)  # type: ignore[no-any-return]

    def _soft_bits(self, gates_TK: Tensor) -> Tensor:
        """t of `gate_gradient`, [T, K], of which the gradient alone is used unless levels are scaled by it."""
        if self.gate_gradient == "none":
            return gates_TK.detach()
        soft_TK = gates_TK.abs().tanh()
        if self.gate_gradient == "sampled" and self.full_depth > 1:
            soft_TK = torch.cat([soft_TK[:, : self.full_depth] * self.full_depth, soft_TK[:, self.full_depth :]], dim=1)
        return soft_TK

    def _before_forward(self) -> None:
        if not (self.training and torch.is_grad_enabled()) or _is_recomputing():
            return
        if self.table is not None and DistributedDataParallel._get_active_ddp_module() is not None:
            raise RuntimeError(
                "a lazy TreeLinear inside DistributedDataParallel would train a different table on every rank; "
                "use distcond.initialize(model=model, config=...) or storage='dense'"
            )
        if self.commits_by_itself and self._backward_seen:
            self.commit_statistics()
        self._backward_seen = False

    def gate_levels(self) -> list[int]:
        """Levels whose gates learn from this pass, ascending."""
        if self.gate_gradient not in {"straight_through", "sampled"} or self.gate is None:
            return []
        full = list(range(1, self.full_depth + 1))
        if self.gate_gradient == "sampled" and full:  # the same level on all ranks, and after a restart
            full = [full[(int(self.seed) + int(self.gate.num_commits)) % len(full)]]
        return [*full, *range(self.full_depth + 1, self.depth + 1)]

    def note_backward(self, path: TreePath, statistics: Tensor | None) -> None:
        """Record what a backward pass reached: once for each forward, however often that is computed again."""
        self._backward_seen = True
        if self.gate is not None and statistics is not None:
            self.gate.stage(statistics)
        if self.records_touched:
            self._touched.append(torch.cat([level.nodes_G for level in path.levels]))
        if not self.records_loads:
            return
        last = path.levels[-1]
        counts = last.count_G
        self._leaf_loads.append((last.nodes_G - (2**self.depth - 1), counts))

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
            for _, store in self.table.stores():
                self._keep_own(store)


def _is_recomputing() -> bool:
    """Whether a backward pass computes a forward pass again, under activation checkpointing."""
    return torch._C._current_graph_task_id() != -1
