"""The tree product on a GPU by kernels of its own (Triton): some ten launches a pass, whatever the depth and number of nodes.

The full matrices on the way to each node of the last full level are added up, in one launch; tokens are multiplied by the
sums, in one more; low-rank levels are walked token by token. Backward mirrors this, and sums gradients up the tree. Rows of x
and y are read and written where they are, not in the order of the leaves. Sums are made in fp32; fp32 factors are multiplied
as three products of tf32 parts, as exact as fp32, or one where torch may do so (`torch.set_float32_matmul_precision`).
Gradients do not depend on the order in which programs run.

Legend: T tokens, Q in, P out, p some of P, K depth, r rank, G nodes of the last full level, N nodes of all levels, L low-rank
levels, S rows stored.
"""

from collections.abc import Collection, Iterator
from types import ModuleType

import torch
from torch import Tensor

from distcond.ops import fused_rows
from distcond.ops.path import NodeTensors, TreePath
from distcond.ops.per_level import PerLevel

SUM_NUMBERS = 2**29
"Numbers of sums of matrices that are in work at a time, 1 GiB in bf16; where there are more, some rows of P after others."
WIDEST_VECTOR = 2**13
"Inputs and outputs that low-rank levels keep in registers."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUSY = 512
"Programs that keep a GPU of 132 multiprocessors busy."
LEVELS_BELOW = 3
"Levels that a program adds up, or sums up, below a node: eight nodes at most."


def serves(x_TQ: Tensor, path: TreePath, nodes: NodeTensors) -> bool:
    """Whether the kernels compute this: on a GPU, in fp32 or less, where Triton is installed (as it is with torch for CUDA)."""
    if path.number_LT is None or not fused_rows.serves(x_TQ):
        return False
    is_narrow = max(nodes.weight_SPQ.shape[1:]) <= WIDEST_VECTOR
    return is_narrow and x_TQ.dtype in DTYPES and nodes.weight_SPQ.dtype == torch.float32


def fused_forward(x_TQ: Tensor, path: TreePath, rows: PerLevel, nodes: NodeTensors, full_depth: int) -> Tensor:
    """`tree_forward` for at least one token: fp32, [T, P]. Sums of matrices stay with the path for the backward pass."""
    x_TQ = x_TQ.contiguous()
    y_TP = x_TQ.new_empty(len(path.order_T), nodes.bias_SP.shape[1], dtype=torch.float32)
    sums = list(_parts(path, rows, nodes, full_depth, x_TQ.dtype)) if _are_small(path, nodes, full_depth) else None
    path.kept_sums = sums
    for part, weight_GpQ, bias_Gp in sums or _parts(path, rows, nodes, full_depth, x_TQ.dtype):
        _multiply(y_TP[:, part], x_TQ, path, full_depth, weight_GpQ, bias_Gp)
    if full_depth < path.depth:
        _add_low_rank(y_TP, x_TQ, path, rows, nodes, full_depth + 1)
    return y_TP


def fused_backward(
    x_TQ: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: PerLevel,
    nodes: NodeTensors,
    full_depth: int,
    gate_levels: Collection[int],
    out: NodeTensors,
) -> tuple[Tensor, Tensor]:
    """`tree_backward` for at least one token, in fp32."""
    x_TQ, grad_TP = x_TQ.contiguous(), grad_TP.contiguous()
    tokens, depth = len(path.order_T), path.depth
    grad_x_TQ = x_TQ.new_empty(tokens, x_TQ.shape[1], dtype=torch.float32)
    sums, path.kept_sums = path.kept_sums, None
    for part, weight_GpQ, _ in sums or _parts(path, rows, nodes, full_depth, x_TQ.dtype):
        back_TQ = torch.empty_like(grad_x_TQ) if part.start else grad_x_TQ
        _multiply(back_TQ, grad_TP[:, part], path, full_depth, weight_GpQ.mT, None)
        if part.start:
            grad_x_TQ += back_TQ
    change_TK = torch.zeros(tokens, depth, device=x_TQ.device)
    wanted = sum(1 << level for level in gate_levels)
    if any(level <= full_depth for level in gate_levels):
        _level_changes(change_TK, x_TQ, grad_TP, path, rows, nodes, full_depth, wanted)
    _full_gradients(out, x_TQ, grad_TP, path, full_depth)
    if full_depth < depth:
        _low_rank_backward(grad_x_TQ, change_TK, out, x_TQ, grad_TP, path, rows, nodes, full_depth + 1, wanted)
    return grad_x_TQ, change_TK


def _are_small(path: TreePath, nodes: NodeTensors, full_depth: int) -> bool:
    """Whether the sums of all matrices fit into the memory that is given to them."""
    return path.nodes.sizes[full_depth] * nodes.weight_SPQ.shape[1:].numel() <= SUM_NUMBERS


def _parts(
    path: TreePath, rows: PerLevel, nodes: NodeTensors, full_depth: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Matrices and biases added up from the root to the nodes of the last full level, for some rows of P after others."""
    outputs, inputs = nodes.weight_SPQ.shape[1:]
    step = max(16, SUM_NUMBERS // (path.nodes.sizes[full_depth] * inputs) // 16 * 16)
    for low in range(0, outputs, step):
        part = slice(low, low + step)
        weight_GpQ = _add_up(nodes.weight_SPQ[:, part], path, rows, full_depth, dtype)
        yield part, weight_GpQ, _add_up(nodes.bias_SP[:, part], path, rows, full_depth, torch.float32)


def _add_up(stored_S: Tensor, path: TreePath, rows: PerLevel, full_depth: int, dtype: torch.dtype) -> Tensor:
    flat, sizes, bounds = path.flat(), path.nodes.sizes, path.nodes.bounds
    total_G = torch.empty(sizes[full_depth], *stored_S.shape[1:], device=stored_S.device, dtype=dtype)
    numbers, above = stored_S.shape[1:].numel(), max(0, full_depth - LEVELS_BELOW)
    block = 1024 if sizes[above] * numbers >= 1024 * BUSY else 256
    _kernels().add_up[(sizes[above], _ceil(numbers, block))](
        total_G, stored_S, stored_S.stride(0), rows.flat_N, path.number_LT, flat.start_N, flat.counts.flat_N, len(path.order_T),
        numbers, bounds[above], bounds[full_depth], shared=above + 1, levels=full_depth + 1, BLOCK=block,
    )  # fmt: skip
    return total_G


def _multiply(y_TP: Tensor, x_TQ: Tensor, path: TreePath, level: int, weight_GPQ: Tensor, bias_GP: Tensor | None) -> None:
    """y = x @ weight^T + bias of the token's node on a level; x may have a row for all trees of a token."""
    assert path.number_LT is not None
    groups, width_out, width_in = weight_GPQ.shape
    rows = _tile_rows(len(y_TP) / groups)
    columns, inner = (64, 32) if x_TQ.dtype == torch.float32 else (128 if rows <= 64 else 64, 64)
    _kernels().product[(_ceil(len(y_TP), rows), _ceil(width_out, columns))](
        x_TQ, weight_GPQ, bias_GP, y_TP, path.order_T, path.number_LT[level], path.nodes.bounds[level], len(y_TP), width_in,
        width_out, x_TQ.stride(0), *weight_GPQ.stride(), width_out, y_TP.stride(0),
        trees=len(y_TP) // len(x_TQ), has_bias=bias_GP is not None, precision=fused_rows.precision(),
        BM=rows, BN=columns, BK=inner,
    )  # fmt: skip


def _level_changes(
    change_TK: Tensor,
    x_TQ: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: PerLevel,
    nodes: NodeTensors,
    full_depth: int,
    wanted: int,
) -> None:
    """Write grad . (U_l x + c_l) of each token for the full levels that are wanted."""
    tile = _tile_rows(len(change_TK) / path.nodes.sizes[full_depth])
    _kernels().level_change[(_ceil(len(change_TK), tile), full_depth)](
        x_TQ, grad_TP, nodes.weight_SPQ, nodes.bias_SP, change_TK, path.order_T, path.number_LT, rows.flat_N, wanted,
        len(change_TK), x_TQ.shape[1], grad_TP.shape[1], x_TQ.stride(0), grad_TP.stride(0), nodes.weight_SPQ.stride(0),
        nodes.bias_SP.stride(0), change_TK.stride(0),
        trees=len(change_TK) // len(x_TQ), precision=fused_rows.precision(), BM=tile, BN=64, BK=32,
    )  # fmt: skip


def _full_gradients(out: NodeTensors, x_TQ: Tensor, grad_TP: Tensor, path: TreePath, full_depth: int) -> None:
    """Write the gradients of full nodes: outer products at the last full level, summed up the tree."""
    flat, bounds, sizes = path.flat(), path.nodes.bounds, path.nodes.sizes
    last = slice(bounds[full_depth], bounds[full_depth + 1])
    _outer(out.weight_SPQ[last], out.bias_SP[last], x_TQ, grad_TP, path, last.start)
    block, numbers = 1024, (grad_TP.shape[1] * x_TQ.shape[1], grad_TP.shape[1])
    for level in range(full_depth, 0, -LEVELS_BELOW):
        above = max(0, level - LEVELS_BELOW)
        _kernels().sum_up[(sizes[above], sum(_ceil(number, block) for number in numbers))](
            out.weight_SPQ, out.weight_SPQ.stride(0), numbers[0], out.bias_SP, out.bias_SP.stride(0), numbers[1],
            path.number_LT, flat.start_N, flat.counts.flat_N, len(grad_TP), bounds[above], level, levels=level - above,
            BLOCK=block,
        )  # fmt: skip


def _outer(weight_GPQ: Tensor, bias_GP: Tensor, x_TQ: Tensor, grad_TP: Tensor, path: TreePath, first: int) -> None:
    """Write outer products of the nodes from `first` on, summed over the tokens of each."""
    flat, (groups, outputs, inputs) = path.flat(), weight_GPQ.shape
    rows, columns = (64, 64) if max(outputs, inputs) > 32 else (16, 16)
    blocks = _ceil(outputs, rows) * _ceil(inputs, columns)
    parts = max(1, min(BUSY // (groups * blocks), len(grad_TP) // groups // 128))
    weight, bias = weight_GPQ, bias_GP
    if parts > 1:
        weight, bias = (tensor.new_empty(parts * groups, *tensor.shape[1:]) for tensor in (weight_GPQ, bias_GP))
    _kernels().outer[(parts * groups, blocks)](
        grad_TP, x_TQ, weight, bias, path.order_T, flat.start_N[first:], flat.counts.flat_N[first:], groups, outputs, inputs,
        grad_TP.stride(0), x_TQ.stride(0), weight.stride(0), bias.stride(0),
        trees=len(grad_TP) // len(x_TQ), parts=parts, precision=fused_rows.precision(), BM=rows, BN=columns,
        BT=min(64, _power(max(16, len(grad_TP) // groups))),
    )  # fmt: skip
    if parts > 1:
        weight_GPQ.copy_(weight.unflatten(0, (parts, groups)).sum(0))
        bias_GP.copy_(bias.unflatten(0, (parts, groups)).sum(0))


def _add_low_rank(y_TP: Tensor, x_TQ: Tensor, path: TreePath, rows: PerLevel, nodes: NodeTensors, first: int) -> None:
    """Add what the levels from `first` on give."""
    rank = nodes.right_SrQ.shape[1]
    inputs, outputs = x_TQ.shape[1], y_TP.shape[1]
    _kernels().add_low_rank[(len(y_TP),)](
        x_TQ, y_TP, nodes.right_SrQ, nodes.left_SxP, path.order_T, rows.flat_N, path.number_LT, len(y_TP), first,
        path.depth + 1, inputs, outputs, x_TQ.stride(0), y_TP.stride(0), nodes.right_SrQ.stride(0), nodes.left_SxP.stride(0),
        trees=len(y_TP) // len(x_TQ), rank=rank, has_bias=nodes.left_SxP.shape[1] > rank, BQ=_power(inputs), BP=_power(outputs),
    )  # fmt: skip


def _low_rank_backward(
    grad_x_TQ: Tensor,
    change_TK: Tensor,
    out: NodeTensors,
    x_TQ: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: PerLevel,
    nodes: NodeTensors,
    first: int,
    wanted: int,
) -> None:
    """Add to the gradient of x, write those of the low-rank nodes and of the levels that are wanted."""
    flat, bounds, device = path.flat(), path.nodes.bounds, x_TQ.device
    tokens, inputs, outputs = len(grad_TP), x_TQ.shape[1], grad_TP.shape[1]
    rank, width = nodes.right_SrQ.shape[1], nodes.left_SxP.shape[1]
    hidden_TLr, back_TLr = torch.empty(2, tokens, path.depth + 1 - first, rank, device=device).unbind()
    strides = (x_TQ.stride(0), grad_TP.stride(0))
    trees, levels = tokens // len(x_TQ), path.depth + 1
    _kernels().low_rank_backward[(tokens,)](
        x_TQ, grad_TP, grad_x_TQ, nodes.right_SrQ, nodes.left_SxP, change_TK, hidden_TLr, back_TLr, path.order_T, rows.flat_N,
        path.number_LT, wanted, tokens, first, levels, inputs, outputs,
        *strides, grad_x_TQ.stride(0), nodes.right_SrQ.stride(0), nodes.left_SxP.stride(0), change_TK.stride(0),
        trees=trees, rank=rank, has_bias=width > rank, BQ=_power(inputs), BP=_power(outputs),
    )  # fmt: skip
    low, block = bounds[first], min(256, _power(max(inputs, outputs)))
    tile = min(16, _power(tokens * (levels - first) // (bounds[-1] - low)))
    _kernels().low_rank_outer[(bounds[-1] - low, rank + width, _ceil(max(inputs, outputs), block))](
        x_TQ, grad_TP, out.right_SrQ, out.left_SxP, hidden_TLr, back_TLr, path.order_T, flat.start_N[low:],
        flat.counts.flat_N[low:], path.nodes.flat_N[low:], first, levels, inputs, outputs, *strides,
        out.right_SrQ.stride(0), out.left_SxP.stride(0), trees=trees, rank=rank, BT=tile, BW=block, num_warps=1,
    )  # fmt: skip


def _kernels() -> ModuleType:
    from distcond.ops import triton_kernels

    return triton_kernels


def _tile_rows(mean: float) -> int:
    """Rows of a tile: about half of what a group has, so that most tiles are of one or two groups."""
    return min(128, max(16, _power(int(mean)) // 2))


def _power(number: int) -> int:
    """The power of two that is as large or the next larger one."""
    return 1 << max(0, number - 1).bit_length()


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
