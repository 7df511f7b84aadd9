"""The output of a tree layer as the sum of what each node on the path adds: y = sum_l (U_l x + c_l), exactly.

Legend: T tokens, M trees, L levels (K + 1, the root first), K bits, Q in, P out of one tree.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distcond.nn import TreeLinear
from distcond.nn.tree_parts import contributions


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


def attribute(layer: TreeLinear, x_TQ: Tensor, leaf_TM: Tensor | None = None) -> Attribution:
    """What each node adds on the paths of tokens [T, Q]. leaf_TM: other leaves than theirs, int64."""
    return Attribution(*contributions(layer, x_TQ, leaf_TM, torch.float64))
