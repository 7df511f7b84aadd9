"""A tree layer for inference: the matrices on the path to a leaf are added up beforehand, and a prediction costs one.

Legend: T tokens, Q in, P out, K depth, L leaves folded, G leaves touched.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from distcond.nn.tree import TreeLinear
from distcond.nn.tree_input import as_rows
from distcond.nn.tree_product import full_precision
from distcond.ops import leaf_index

MOST_LEAVES = 2**20
"Leaves that are folded without being chosen."


class FlatTree(nn.Module):
    """What a `TreeLinear` computes in evaluation, from one matrix a leaf. Gives no gradients.

    `flatten` makes it; one that is made here has room for so many leaves, and is filled by `load_state_dict`.

    weight, bias: [L, Q, P] and [L, P] of the leaves folded; leaf: their indices, int64 [L] ascending. planes, thresholds:
    [K, Q] and [K], of the bits. Tokens of other leaves go through `rest`, the layer itself (None where every leaf is
    folded), along the nodes that exist for them.
    """

    weight: Tensor
    bias: Tensor
    leaf: Tensor
    planes: Tensor
    thresholds: Tensor

    def __init__(self, layer: TreeLinear, num_leaves: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.depth = layer.in_features, layer.out_features, layer.depth
        like = layer.node_weight(0)
        # Transposed, small products are a sixth faster.
        self.register_buffer("weight", like.new_empty(num_leaves, layer.in_features, layer.out_features))
        self.register_buffer("bias", like.new_empty(num_leaves, layer.out_features))
        self.register_buffer("leaf", torch.arange(num_leaves, device=layer.seed.device))
        planes, thresholds = hyperplanes(layer)
        self.register_buffer("planes", planes)
        self.register_buffer("thresholds", thresholds)
        self.rest = layer if num_leaves < 2**self.depth else None
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
        """A single token: the matrix is read once, and little else may be done beside."""
        singles = self._singles or self._make_singles()
        leaf = 0
        for gate in torch.addmm(singles.offsets, x_1Q.to(singles.offsets.dtype), singles.planes_QK).tolist()[0]:
            leaf = 2 * leaf + (gate > 0)
        found = singles.leaves.get(leaf)
        return self._through_rest(x_1Q) if found is None else torch.addmm(found[0], x_1Q.to(found[0].dtype), found[1])

    def _make_singles(self) -> "_Singles":
        leaves = dict(zip(self.leaf.tolist(), zip(self.bias.unbind(), self.weight.unbind(), strict=True), strict=True))
        self._singles = _Singles(-self.thresholds, self.planes.t().contiguous(), leaves)
        return self._singles

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._singles = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def _load_from_state_dict(self, *given: Any) -> None:
        self._singles = None
        super()._load_from_state_dict(*given)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_singles": None}

    def _many(self, x_TQ: Tensor) -> Tensor:
        """Tokens sorted by leaf, one product a leaf; those of leaves that are not folded come last."""
        leaf_T = leaf_index(nn.functional.linear(x_TQ.to(self.planes.dtype), self.planes, -self.thresholds) > 0)
        slot_T, order_T = torch.sort(leaf_T if self.rest is None else self._slots(leaf_T), stable=True)
        slot_G, count_G = torch.unique_consecutive(slot_T, return_counts=True)
        sorted_TQ = x_TQ.index_select(0, order_T).to(self.weight.dtype)
        out_TP, sizes = sorted_TQ.new_empty(len(x_TQ), self.out_features), count_G.tolist()
        for slot, x, out in zip(slot_G.tolist(), sorted_TQ.split(sizes), out_TP.split(sizes), strict=True):
            if slot < len(self.leaf):
                torch.addmm(self.bias[slot], x, self.weight[slot], out=out)
            else:
                out.copy_(self._through_rest(x))
        return torch.empty_like(out_TP).index_copy_(0, order_T, out_TP)

    def _slots(self, leaf_T: Tensor) -> Tensor:
        """Place of each token's leaf among those that are folded, int64 [T]; L where it is not."""
        slot_T = torch.searchsorted(self.leaf, leaf_T)
        is_folded_T = self.leaf[slot_T.clamp(max=len(self.leaf) - 1)] == leaf_T
        return torch.where(is_folded_T, slot_T, len(self.leaf))

    @torch.no_grad()
    def _through_rest(self, x_TQ: Tensor) -> Tensor:
        assert self.rest is not None
        y_TP: Tensor = self.rest(x_TQ)
        return y_TP


class _Singles(NamedTuple):
    """What a single token needs, taken out of the buffers once: to do so for each costs as much as its product."""

    offsets: Tensor
    "-thresholds, [K]."
    planes_QK: Tensor
    leaves: dict[int, tuple[Tensor, Tensor]]
    "Bias [P] and weight [Q, P] by leaf."


@torch.no_grad()
def flatten(layer: TreeLinear, max_leaves: int | None = None, loads: tuple[Tensor, Tensor] | None = None) -> FlatTree:
    """Fold a layer's leaves: all of them, or the `max_leaves` that `loads` says most tokens visit.

    loads: leaves, int64 [G], and their tokens, [G], as `TreeLinear.take_leaf_loads` gives them. The layer itself serves the
    leaves that are left out, so that it must stay as it is; a folded leaf takes P Q + P numbers.
    Raises ValueError for a layer without a matrix a leaf (gate_gradient="magnitude"; several trees), for one whose nodes are
    spread over ranks, and where it cannot be known which leaves to fold.
    """
    if layer.scales_levels:
        raise ValueError("gate_gradient='magnitude' scales each level by the token's gates: a leaf has no matrix of its own")
    if layer.num_trees > 1:
        raise ValueError(f"num_trees={layer.num_trees}: a leaf of one of several trees has a part of the outputs only")
    if layer.plan.is_sharded:
        raise ValueError("this rank holds a part of the nodes only; flatten a layer loaded from a checkpoint by one process")
    most = MOST_LEAVES if max_leaves is None else max_leaves
    if most < 1:
        raise ValueError(f"max_leaves={max_leaves} is below 1; fold 1 or more leaves, or use the layer as it is")
    if 2**layer.depth <= most:
        return _fold(layer, torch.arange(2**layer.depth, device=layer.seed.device))
    if loads is None:
        raise ValueError(f"of 2**{layer.depth} leaves at most {most} are folded; give loads, which say which are visited")
    leaf_G, count_G = loads
    hottest = torch.argsort(count_G, descending=True, stable=True)[:most]
    return _fold(layer, leaf_G[hottest].sort().values)


def _fold(layer: TreeLinear, leaf_L: Tensor) -> FlatTree:
    flat = FlatTree(layer, len(leaf_L))
    flat.leaf.copy_(leaf_L)
    for slot, leaf in enumerate(leaf_L.tolist()):
        weight, bias = layer.effective_weight(leaf)
        flat.weight[slot], flat.bias[slot] = weight.t(), bias
    return flat


def hyperplanes(layer: TreeLinear) -> tuple[Tensor, Tensor]:
    """Planes [K, Q] and thresholds [K] whose bits are those of a layer: bit k is 1 where plane_k . x > threshold_k."""
    gate, like = layer.gate, layer.node_weight(0)
    if gate is None:
        return like.new_zeros(0, layer.in_features), like.new_zeros(0)
    if gate.kind == "sign":
        return torch.eye(layer.depth, layer.in_features).to(gate.running_mean), torch.zeros_like(gate.running_mean)
    return gate.weight.to(gate.running_mean.dtype, copy=True), gate.running_mean.clone()
