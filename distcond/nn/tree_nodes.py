"""The nodes of a tree layer as parameters; and single ones as dense matrices, whether they are parameters or rows of a table.

Legend: P out, Q in, S nodes stored, r rank, x = r + 1 with a bias, else r.
"""

import torch
from torch import Tensor, nn

from distcond.ops import NodeTensors
from distcond.table import NodeTable


def dense_node(node_id: int, nodes: NodeTensors, layout: NodeTable, table: NodeTable | None) -> tuple[Tensor, Tensor]:
    """Matrix [P, Q] and bias [P] of a node, zeros where a table does not hold it.

    nodes: all that are stored, in a table or, where that is None, as parameters in the order of their ids.
    """
    is_full = node_id < layout.num_full_ids
    if table is not None:
        row = int((table.full if is_full else table.low).find(table.full.keys.new_tensor([node_id])))
        if row < 0:
            zeros_PQ = nodes.bias_SP.new_zeros(layout.out_features, layout.in_features)
            return zeros_PQ, zeros_PQ[:, 0]
    else:
        row = node_id if is_full else node_id - layout.num_full_ids
    if is_full:
        return nodes.weight_SPQ[row], nodes.bias_SP[row]
    left_xP, rank = nodes.left_SxP[row], nodes.right_SrQ.shape[1]
    return left_xP[:rank].t() @ nodes.right_SrQ[row], left_xP[rank:].sum(0)


def add_parameters(layer: nn.Module, layout: NodeTable) -> None:
    """Register weight, bias, right and left of all nodes, as they start."""
    full, rows = layout.num_full_ids, layout.out_features
    low = layout.newborn("low", torch.arange(full, layout.num_ids))
    fresh = layout.as_matrices(layout.full.data, low)
    _register(layer, "weight", torch.zeros(full, rows, layout.in_features))
    _register(layer, "bias", torch.zeros(full if layout.has_bias else 0, rows))
    default = torch.get_default_dtype()
    _register(layer, "right", fresh.right_SrQ.to(default, copy=True))
    _register(layer, "left", fresh.left_SxP.to(default, copy=True))


def _register(layer: nn.Module, name: str, value: Tensor) -> None:
    if value.numel():
        layer.register_parameter(name, nn.Parameter(value))
    else:  # NOTE: ZeRO 3 cannot gather a parameter without numbers
        layer.register_buffer(name, value, persistent=False)
