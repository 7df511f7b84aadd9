"""The tree product as a compiled kernel: one walk over the tree for each panel of rows, everything between in the caches.

Chosen by `use_kernels("native")`; serves contiguous fp32 on a CPU and leaves everything else to torch. See csrc/tree.c for
how it computes. Threads are torch's, `torch.get_num_threads()`; at most one for 16 rows of output is used.

Legend: T tokens, Q in, P out, K depth, N nodes touched on all levels.
"""

import ctypes
import functools
import threading
from collections.abc import Collection, Sequence
from ctypes import c_float, c_int, c_int64, c_long, c_void_p
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from distcond.errors import ConfigError
from distcond.ops.compiler import load_compiled
from distcond.ops.path import FlatPath, Level, NodeTensors, TreePath

KERNELS = ("torch", "native")
MOST_UNITS = 64
"Of a low-rank node, with that of the bias; as in csrc/low_rank.h."

_chosen = "torch"
_own = threading.local()


class _Rows(ctypes.Structure):
    _fields_ = (("at", c_void_p), ("step", c_long))


class _Gradients(ctypes.Structure):
    _fields_ = tuple((name, _Rows) for name in ("weight", "bias", "right", "left"))


class _Adam(ctypes.Structure):
    _fields_ = tuple((name, c_float) for name in ("beta1", "beta2", "eps"))


class _Tree(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "in_features", "out_features", "rank", "left", "full", "depth")),
        *((name, c_void_p) for name in ("order", "bounds", "start", "parent", "row")),
        ("nodes", _Gradients),
    )


def use_kernels(name: str) -> None:
    """Compute tree products of this process by "torch", which works everywhere, or "native", which is compiled by GCC.

    Raises ConfigError for another name, or where native kernels cannot be compiled.
    """
    global _chosen
    if name not in KERNELS:
        raise ConfigError(f"kernels={name!r} are unknown; use one of {KERNELS}")
    if name == "native":
        library()
    _chosen = name


def kernels() -> str:
    """What computes tree products here: "torch" or "native"."""
    return _chosen


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises ConfigError where they cannot be compiled."""
    loaded = load_compiled(Path(__file__).parent / "csrc" / "tree.c")
    loaded.distcond_work.restype = c_int64
    return loaded


def serves(x_TQ: Tensor, nodes: NodeTensors) -> bool:
    """Whether the native kernels are chosen, and made for these tensors."""
    return nodes.left_SxP.shape[1] <= MOST_UNITS and computes(x_TQ, nodes.weight_SPQ)


def computes(*tensors: Tensor) -> bool:
    """Whether the native kernels are chosen, and the tensors fp32 on a CPU."""
    return _chosen == "native" and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def path_of(leaf_T: Tensor, depth: int) -> TreePath:
    """`TreePath.of`, compiled."""
    tokens, most = len(leaf_T), sum(min(len(leaf_T), 2**level) for level in range(depth + 1))
    order_T, place_T, spare_T = (torch.empty(tokens, dtype=torch.int64) for _ in range(3))
    bounds = torch.empty(depth + 2, dtype=torch.int64)
    nodes_N, start_N, parent_N, count_N = torch.empty(4, most, dtype=torch.int64).unbind()
    outputs = (order_T, place_T, bounds, nodes_N, start_N, parent_N, count_N, spare_T)
    leaf_T = leaf_T.contiguous()
    library().distcond_path(_at(leaf_T), c_int64(tokens), c_int64(depth), *(_at(output) for output in outputs))
    parts = [slice(*ends) for ends in pairwise(bounds.tolist())]
    levels = [Level(nodes_N[part], parent_N[part], count_N[part]) for part in parts]
    return TreePath(order_T, place_T, levels, FlatPath(bounds, start_N, parent_N))


def forward(x_TQ: Tensor, path: TreePath, rows: Sequence[Tensor], nodes: NodeTensors, full_depth: int) -> Tensor:
    """`tree_forward` for at least one token."""
    x_TQ, row_N = x_TQ.contiguous(), torch.cat(list(rows))
    y_TP, threads = x_TQ.new_empty(len(x_TQ), nodes.bias_SP.shape[1]), torch.get_num_threads()
    tree = _tree(x_TQ, path, row_N, nodes, full_depth)
    work = _work(library().distcond_work(ctypes.byref(tree), c_int64(0), c_int(threads)))
    library().distcond_forward(ctypes.byref(tree), _at(x_TQ), _at(y_TP), _at(work), c_int(threads))
    return y_TP


def backward(
    x_TQ: Tensor,
    grad_TP: Tensor,
    path: TreePath,
    rows: Sequence[Tensor],
    nodes: NodeTensors,
    full_depth: int,
    gate_levels: Collection[int],
    out: NodeTensors,
) -> tuple[Tensor, Tensor]:
    """`tree_backward` for at least one token."""
    x_TQ, grad_TP, row_N = x_TQ.contiguous(), grad_TP.contiguous(), torch.cat(list(rows))
    grad_x_TQ, threads = torch.empty_like(x_TQ), torch.get_num_threads()
    through_TW = x_TQ.new_empty(len(x_TQ), len(gate_levels))
    tree = _tree(x_TQ, path, row_N, nodes, full_depth)
    work = _work(library().distcond_work(ctypes.byref(tree), c_int64(len(gate_levels)), c_int(threads)))
    gates, gradients = c_int64(sum(1 << level for level in gate_levels)), _Gradients(*(_rows(part) for part in out))
    tokens = (_at(x_TQ), _at(grad_TP), _at(grad_x_TQ))
    outputs = (ctypes.byref(gradients), gates, _at(through_TW), _at(work), c_int(threads))
    library().distcond_backward(ctypes.byref(tree), *tokens, *outputs)
    if len(gate_levels) == len(rows) - 1:
        return grad_x_TQ, through_TW
    grad_levels_TK = x_TQ.new_zeros(len(x_TQ), len(rows) - 1)
    grad_levels_TK[:, [level - 1 for level in sorted(gate_levels)]] = through_TW
    return grad_x_TQ, grad_levels_TK


def adam(
    data_S: Tensor,
    moments: tuple[Tensor, Tensor],
    rows_G: Tensor,
    grad_G: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Adam on rows of a tensor and of its moments, [S, ...], in place: decay w - size m / (sqrt(v) / root + eps).

    factors: decay, size and root of each row, [G].
    """
    rows_G, grad_G = rows_G.contiguous(), grad_G.contiguous()
    own = [factor.to(torch.float32).contiguous() for factor in factors]
    sizes = (c_int64(len(rows_G)), c_int64(grad_G[0].numel()))
    tensors = (_at(tensor) for tensor in (grad_G, data_S, *moments, *own))
    settings, threads = _Adam(*betas, eps), c_int(torch.get_num_threads())
    library().distcond_adam(ctypes.byref(settings), _at(rows_G), *sizes, *tensors, threads)


def _tree(x_TQ: Tensor, path: TreePath, row_N: Tensor, nodes: NodeTensors, full_depth: int) -> _Tree:
    """NOTE: holds addresses alone; what they belong to must outlive the call."""
    flat = path.flat()
    sizes = (
        *x_TQ.shape,
        nodes.bias_SP.shape[1],
        nodes.right_SrQ.shape[1],
        nodes.left_SxP.shape[1],
        full_depth,
        len(path.levels) - 1,
    )
    arrays = (path.order_T, flat.bounds, flat.start_N, flat.parent_N, row_N)
    return _Tree(*sizes, *(_at(array) for array in arrays), _Gradients(*(_rows(part) for part in nodes)))


def _work(numbers: int) -> Tensor:
    """Memory of this thread's own, the same at every call: to take it anew from the system costs more than to use it."""
    if getattr(_own, "work", None) is None or len(_own.work) < numbers:
        _own.work = torch.empty(numbers)
    return _own.work  # type: ignore[no-any-return]


def _at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _rows(tensor_S: Tensor) -> _Rows:
    return _Rows(tensor_S.data_ptr(), tensor_S.stride(0))
