"""Single nodes of a tree layer as dense matrices, whether they are parameters or rows of a table.

Legend: P out, Q in, S nodes stored, r rank, x = r + 1 with a bias, else r.
"""

from torch import Tensor

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
