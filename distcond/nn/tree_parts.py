"""The parts of a tree layer: what each node on a path adds to the output, y = sum_l (U_l x + c_l), and how large nodes are.

Legend: T tokens, M trees, L levels (K + 1, the root first), K depth, Q in, P out of one tree, N nodes, r rank.
"""

import torch
from torch import Tensor

from distcond.nn.tree import TreeLinear
from distcond.ops import NodeTensors, first_node

BLOCK_NUMBERS = 2**22
"Numbers of the nodes whose norms are computed at a time."


@torch.no_grad()
def contributions(
    layer: TreeLinear, x_TQ: Tensor, leaf_TM: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """U_l x and c_l of the nodes on the path of each token, [T, M, L, P] each, zeros where a node does not exist here.

    Under `magnitude` gates both are times tanh|g_l|. Their sum over L is the output. leaf_TM: other leaves than theirs, int64.
    dtype: of the products; None: that of x.
    """
    leaf_TM = layer.leaf(x_TQ) if leaf_TM is None else leaf_TM
    gates_TMK = layer.gates(x_TQ) if layer.scales_levels else None
    nodes, trees_M, x_TQ = _matrices(layer), torch.arange(layer.num_trees, device=x_TQ.device), x_TQ.to(dtype or x_TQ.dtype)
    matrix, bias = [], []
    for level in range(layer.depth + 1):
        keys_TM = first_node(level, layer.num_trees) + (trees_M << level) + (leaf_TM >> (layer.depth - level))
        parts = _products(layer, nodes, keys_TM, x_TQ, is_full=level <= layer.full_depth)
        if level and gates_TMK is not None:
            scale_TM1 = gates_TMK[..., level - 1, None].to(x_TQ).abs().tanh()
            parts = (parts[0] * scale_TM1, parts[1] * scale_TM1)
        matrix.append(parts[0])
        bias.append(parts[1])
    return torch.stack(matrix, 2), torch.stack(bias, 2)


def path_of(leaf: int, depth: int) -> list[int]:
    """Ids of the nodes on the path to a leaf in its tree, the root first."""
    return [2**level - 1 + (leaf >> (depth - level)) for level in range(depth + 1)]


def node_keys(layer: TreeLinear) -> Tensor:
    """Nodes that exist here, as `first_node` counts them, ascending int64 [N]."""
    if layer.table is None:
        return torch.arange(layer.layout.num_ids, device=layer.seed.device)
    return torch.cat([store.keys for _, store in layer.table.stores()]).sort().values


@torch.no_grad()
def node_norms(layer: TreeLinear, keys_N: Tensor) -> Tensor:
    """Frobenius norms of the matrices of nodes, fp32 [N]; 0 where a node does not exist here."""
    nodes = _matrices(layer)
    keys_N = keys_N.to(nodes.bias_SP.device)
    norms_N = torch.zeros(len(keys_N), device=nodes.bias_SP.device)
    is_full_N = keys_N < layer.layout.num_full_ids
    for is_full in (True, False):
        place_N = (is_full_N == is_full).nonzero()[:, 0]
        rows_N = _rows(layer, keys_N[place_N], is_full=is_full)
        place_N, rows_N = place_N[rows_N >= 0], rows_N[rows_N >= 0]
        size = max(1, BLOCK_NUMBERS // max(1, nodes.weight_SPQ.shape[1:].numel() if is_full else nodes.low_numbers))
        for place, rows in zip(place_N.split(size), rows_N.split(size), strict=True):
            if is_full:
                norms_N[place] = nodes.weight_SPQ[rows].float().flatten(1).norm(dim=1)
            else:
                norms_N[place] = _low_rank_norm(nodes.left_SxP[rows, : layer.rank].float(), nodes.right_SrQ[rows].float())
    return norms_N


def _low_rank_norm(left_NrP: Tensor, right_NrQ: Tensor) -> Tensor:
    """Of A B: the trace of (A'A)(BB'), without making the matrices."""
    grams = (left_NrP @ left_NrP.transpose(1, 2)) * (right_NrQ @ right_NrQ.transpose(1, 2))
    return grams.sum(dim=(1, 2)).clamp(min=0).sqrt()


def _matrices(layer: TreeLinear) -> NodeTensors:
    return layer.node_tensors(layer.node_parameters())


def _products(layer: TreeLinear, nodes: NodeTensors, keys_TM: Tensor, x_TQ: Tensor, *, is_full: bool) -> tuple[Tensor, Tensor]:
    """Of each token with the node of each tree, and that node's bias: [T, M, P] each."""
    y_TMP = x_TQ.new_zeros(*keys_TM.shape, layer.out_features // layer.num_trees)
    c_TMP = torch.zeros_like(y_TMP)
    rows_TM = _rows(layer, keys_TM.flatten(), is_full=is_full).view_as(keys_TM)
    if is_full:
        for row in rows_TM[rows_TM >= 0].unique().tolist():
            token, tree = (rows_TM == row).nonzero(as_tuple=True)
            y_TMP[token, tree] = x_TQ[token] @ nodes.weight_SPQ[row].to(x_TQ).t()
            c_TMP[token, tree] = nodes.bias_SP[row].to(x_TQ)
        return y_TMP, c_TMP
    token, tree = (rows_TM >= 0).nonzero(as_tuple=True)
    row_N = rows_TM[token, tree]
    left_NxP = nodes.left_SxP[row_N].to(x_TQ)
    inner_Nr = torch.einsum("nrq,nq->nr", nodes.right_SrQ[row_N].to(x_TQ), x_TQ[token])
    y_TMP[token, tree] = torch.einsum("nrp,nr->np", left_NxP[:, : layer.rank], inner_Nr)
    c_TMP[token, tree] = left_NxP[:, layer.rank :].sum(1)
    return y_TMP, c_TMP


def _rows(layer: TreeLinear, keys_N: Tensor, *, is_full: bool) -> Tensor:
    """Where nodes are stored, int64 [N]; -1: nowhere."""
    if layer.table is None:
        return keys_N if is_full else keys_N - layer.layout.num_full_ids
    return (layer.table.full if is_full else layer.table.low).find(keys_N)
