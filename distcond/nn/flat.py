"""A tree layer for inference: the matrices on the path to a leaf are added up beforehand, and a prediction costs one.

Legend: T tokens, Q in, P out (of one tree), K depth, M trees, V pairs of token and tree, L leaves folded, G leaves touched.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from distcond.nn.tree import TreeLinear
from distcond.nn.tree_input import as_rows
from distcond.nn.tree_product import full_precision
from distcond.ops import leaf_product, tree_leaf, tree_path

MOST_LEAVES = 2**20
"Leaves of all trees that are folded without being chosen."


class FlatTree(nn.Module):
    """What a `TreeLinear` computes in evaluation, from one matrix a leaf. Gives no gradients.

    `flatten` makes it; one that is made here has room for so many leaves, and is filled by `load_state_dict`.

    weight, bias: [L, Q, P] and [L, P] of the leaves folded; leaf: which these are, tree << K | leaf, int64 [L] ascending.
    planes, thresholds: [M K, Q] and [M K], of the bits. Tokens of other leaves go through `rest`, the layer itself (None
    where every leaf is folded), along the nodes that exist for them.
    """

    weight: Tensor
    bias: Tensor
    leaf: Tensor
    planes: Tensor
    thresholds: Tensor

    def __init__(self, layer: TreeLinear, num_leaves: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.depth, self.num_trees = layer.depth, layer.num_trees
        like = layer.node_weight(0)
        # Transposed, small products are a sixth faster.
        self.register_buffer("weight", like.new_empty(num_leaves, layer.in_features, len(like)))
        self.register_buffer("bias", like.new_empty(num_leaves, len(like)))
        self.register_buffer("leaf", torch.arange(num_leaves, device=layer.seed.device))
        planes, thresholds = hyperplanes(layer)
        self.register_buffer("planes", planes)
        self.register_buffer("thresholds", thresholds)
        self.rest = layer if num_leaves < self.num_trees << self.depth else None
        self._singles: _Singles | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        x_TQ = as_rows(x.detach(), self.in_features)
        # NOTE: nothing here asks for a gradient; `torch.no_grad()` would cost a single token a tenth of its time.
        with full_precision(x):
            y_TP = self._one(x_TQ) if len(x_TQ) == 1 else self._many(x_TQ)
        y_TP = y_TP.to(x.dtype)
        return y_TP if x.dim() == 2 else y_TP.view(*x.shape[:-1], self.out_features)

    def _one(self, x_1Q: Tensor) -> Tensor:
        """A single token: each tree's matrix is read once, and little else may be done beside."""
        singles = self._singles or self._make_singles()
        gates = torch.addmm(singles.offsets, x_1Q.to(singles.offsets.dtype), singles.planes_QK).tolist()[0]
        parts = []
        for leaf in range(self.num_trees):  # from the tree's number on, bit by bit
            for gate in gates[leaf * self.depth : (leaf + 1) * self.depth]:
                leaf = 2 * leaf + (gate > 0)
            found = singles.leaves.get(leaf)
            if found is None:
                return self._through_rest(x_1Q)
            parts.append(torch.addmm(found[0], x_1Q.to(found[0].dtype), found[1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _make_singles(self) -> "_Singles":
        leaves = dict(zip(self.leaf.tolist(), zip(self.bias.unbind(), self.weight.unbind(), strict=True), strict=True))
        self._singles = _Singles(-self.thresholds, self.planes.t().contiguous(), leaves)
        return self._singles

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Planes and thresholds follow to another device, and to fp64; never below fp32, for bits are signs of their gates."""
        self._singles, planes, thresholds = None, self.planes, self.thresholds
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.planes.dtype.itemsize < torch.float32.itemsize:
            self.planes = planes.to(self.planes.device, torch.float32)
            self.thresholds = thresholds.to(self.planes.device, torch.float32)
        return self

    def _load_from_state_dict(self, *given: Any) -> None:
        self._singles = None
        super()._load_from_state_dict(*given)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_singles": None}

    def _many(self, x_TQ: Tensor) -> Tensor:
        """Pairs of token and tree sorted by leaf, one product a leaf; those of leaves that are not folded come last."""
        gates = nn.functional.linear(x_TQ.to(self.planes.dtype), self.planes, -self.thresholds)
        leaf_V = tree_leaf(gates.view(len(x_TQ), self.num_trees, self.depth))
        path = tree_path(leaf_V if self.rest is None else self._slots(leaf_V), 0, len(self.leaf) + 1)
        y_VP = leaf_product(x_TQ.to(self.weight.dtype), path, self.weight, self.bias)
        slots, counts = path.last_level()
        if self.rest is not None and len(slots) and int(slots[-1]) == len(self.leaf):
            others_V = path.order_T[-int(counts[-1]) :]
            y_VP[others_V] = self._others(x_TQ.to(self.weight.dtype), others_V)
        return y_VP.view(-1, self.out_features)

    def _slots(self, leaf_V: Tensor) -> Tensor:
        """Place of each leaf among those that are folded, int64 [V]; L where it is not."""
        slot_V = torch.searchsorted(self.leaf, leaf_V)
        is_folded_V = self.leaf[slot_V.clamp(max=len(self.leaf) - 1)] == leaf_V
        return torch.where(is_folded_V, slot_V, len(self.leaf))

    def _others(self, x_TQ: Tensor, pair_V: Tensor) -> Tensor:
        """What the layer itself says for pairs, token * M + tree, [V, P]; a token goes through it once."""
        token_S, place_V = torch.unique(pair_V // self.num_trees, return_inverse=True)
        y_SMP = self._through_rest(x_TQ[token_S]).unflatten(1, (self.num_trees, -1))
        y_VP: Tensor = y_SMP[place_V, pair_V % self.num_trees]
        return y_VP

    @torch.no_grad()
    def _through_rest(self, x_TQ: Tensor) -> Tensor:
        assert self.rest is not None
        y_TP: Tensor = self.rest(x_TQ)
        return y_TP


class _Singles(NamedTuple):
    """What a single token needs, taken out of the buffers once: to do so for each costs as much as its product."""

    offsets: Tensor
    "-thresholds, [M K]."
    planes_QK: Tensor
    "[Q, M K]."
    leaves: dict[int, tuple[Tensor, Tensor]]
    "Bias [P] and weight [Q, P] by tree << K | leaf."


@torch.no_grad()
def flatten(layer: TreeLinear, max_leaves: int | None = None, loads: tuple[Tensor, Tensor] | None = None) -> FlatTree:
    """Fold a layer's leaves: all of them, or the `max_leaves` that `loads` says most tokens visit, whichever tree they are of.

    loads: leaves, tree << K | leaf, int64 [G], and their tokens, [G], as `TreeLinear.take_leaf_loads` gives them. The layer
    itself serves the leaves that are left out, so that it must stay as it is; a folded leaf takes P Q + P numbers.
    Raises ValueError for gate_gradient="magnitude", for a layer whose nodes are spread over ranks, and where it cannot be
    known which leaves to fold.
    """
    # NOTE: under "magnitude" y = U_root x + sum over l of tanh|g_l(x)| U_l x: the matrix is a function of the token, not of
    # its leaf alone, so that only the K + 1 matrices of a path are shared by the tokens of a leaf, and these the layer has.
    if layer.scales_levels:
        raise ValueError("gate_gradient='magnitude' scales each level by the token's gates: a leaf has no matrix of its own")
    if layer.plan.is_sharded:
        raise ValueError("this rank holds a part of the nodes only; flatten a layer loaded from a checkpoint by one process")
    most = MOST_LEAVES if max_leaves is None else max_leaves
    if most < 1:
        raise ValueError(f"max_leaves={max_leaves} is below 1; fold 1 or more leaves, or use the layer as it is")
    if layer.num_trees << layer.depth <= most:
        return _fold(layer, torch.arange(layer.num_trees << layer.depth, device=layer.seed.device))
    if loads is None:
        of = f"{layer.num_trees} x " if layer.num_trees > 1 else ""
        raise ValueError(f"of {of}2**{layer.depth} leaves at most {most} are folded; give loads, which say which are visited")
    leaf_G, count_G = loads
    hottest = torch.argsort(count_G, descending=True, stable=True)[:most]
    return _fold(layer, leaf_G[hottest].sort().values)


def _fold(layer: TreeLinear, leaf_L: Tensor) -> FlatTree:
    flat = FlatTree(layer, len(leaf_L))
    flat.leaf.copy_(leaf_L)
    for slot, leaf in enumerate(leaf_L.tolist()):
        weight, bias = layer.effective_weight(leaf % 2**layer.depth, tree=leaf >> layer.depth)
        flat.weight[slot], flat.bias[slot] = weight.t(), bias
    return flat


def hyperplanes(layer: TreeLinear) -> tuple[Tensor, Tensor]:
    """Planes [M K, Q] and thresholds [M K] whose bits, tree after tree, are a layer's: 1 where plane . x > threshold."""
    gate, like = layer.gate, layer.node_weight(0)
    if gate is None:
        return like.new_zeros(0, layer.in_features), like.new_zeros(0)
    if gate.kind == "sign":
        return torch.eye(gate.num_bits, layer.in_features).to(gate.running_mean), torch.zeros_like(gate.running_mean)
    return gate.weight.to(gate.running_mean.dtype, copy=True), gate.running_mean.clone()
