"""The output of a tree layer as the sum of what each node on the path adds: y = sum_l (U_l x + c_l), exactly.

Legend: T tokens, M trees, L levels (K + 1, the root first), K bits, Q in, P out of one tree.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distcond.nn import TreeLinear


@dataclass(frozen=True, slots=True)
class Attribution:
    """What the nodes on the paths of tokens add to the output, float64; under `magnitude` gates, times tanh|g_l|."""

    matrix_TMLP: Tensor
    "U_l x."
    bias_TMLP: Tensor
    "c_l."

    @property
    def output(self) -> Tensor:
        """Their sum, the layer's output, [T, M x P]."""
        return (self.matrix_TMLP + self.bias_TMLP).sum(2).flatten(1)

    def shares(self, part_TMLP: Tensor) -> Tensor:
        """How much of y each vector is, <v, y> / <y, y>, [T, M, L]: signed, and of all vectors together 1."""
        output_TMP = self.output.unflatten(1, part_TMLP.shape[1::2])
        along_TML = (part_TMLP * output_TMP[:, :, None]).sum(3)
        shares_TML: Tensor = along_TML / output_TMP.square().sum((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]
        return shares_TML


@torch.no_grad()
def attribute(layer: TreeLinear, x_TQ: Tensor, leaf_TM: Tensor | None = None) -> Attribution:
    """What each node adds on the paths of tokens [T, Q]. leaf_TM: other leaves than theirs, int64."""
    leaf_TM = layer.leaf(x_TQ) if leaf_TM is None else leaf_TM
    x_TQ = x_TQ.double()
    sizes = (len(x_TQ), layer.num_trees, layer.depth + 1, layer.out_features // layer.num_trees)
    matrix_TMLP, bias_TMLP = x_TQ.new_zeros(sizes), x_TQ.new_zeros(sizes)
    for token, leaves in enumerate(leaf_TM.tolist()):
        for tree, leaf in enumerate(leaves):
            for level, node in enumerate(path_of(leaf, layer.depth)):
                matrix_TMLP[token, tree, level] = layer.node_weight(node, tree).double() @ x_TQ[token]
                bias_TMLP[token, tree, level] = layer.node_bias(node, tree)
    if layer.scales_levels:
        scale_TMK1 = layer.gates(x_TQ.to(layer.node_bias(0).dtype)).double().abs().tanh()[..., None]
        matrix_TMLP[:, :, 1:] *= scale_TMK1
        bias_TMLP[:, :, 1:] *= scale_TMK1
    return Attribution(matrix_TMLP, bias_TMLP)


def path_of(leaf: int, depth: int) -> list[int]:
    """Ids of the nodes on the path to a leaf, the root first."""
    return [2**level - 1 + (leaf >> (depth - level)) for level in range(depth + 1)]
