"""The tree product as a compiled kernel: one walk over the tree for each panel of rows, everything between in the caches.

Chosen by `use_kernels("native")`; serves contiguous fp32 on a CPU and leaves everything else to torch. See csrc/tree.c for
how it computes. Threads are torch's, `torch.get_num_threads()`; at most one for 16 rows of output is used.

Legend: T tokens, Q in, P out, K depth, N nodes touched on all levels.
"""

import ctypes
import functools
import threading
from collections.abc import Collection, Sequence
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from distcond.errors import ConfigError
from distcond.ops.compiler import load_compiled
from distcond.ops.flips import Flip
from distcond.ops.path import FlatPath, NodeTensors, TreePath
from distcond.ops.per_level import PerLevel

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
        *((name, c_void_p) for name in ("order", "source", "bounds", "start", "parent", "row")),
        ("nodes", _Gradients),
    )


class _Flat(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "groups", "leaves", "in_features", "out_features")),
        *((name, c_void_p) for name in ("order", "source", "start", "matrix", "weight", "bias")),
    )


class _Flip(ctypes.Structure):
    _fields_ = (("level", c_int64), ("row", c_void_p), ("twin", c_void_p))


class _Learn(ctypes.Structure):
    _fields_ = (("levels", c_int64), ("count", c_int64), ("flips", POINTER(_Flip)))


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


_SIGNATURES = {
    "leaf": (None, (c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "nonfinite": (c_int64, (c_void_p, c_int64, c_int64)),
    "square": (c_double, (c_void_p, c_int64, c_int)),
    "find": (None, (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int)),
    "path": (None, (c_void_p, *[c_int64] * 3, *[c_void_p] * 8)),
    "work": (c_int64, (POINTER(_Tree), c_int64, c_int)),
    "forward": (None, (POINTER(_Tree), *[c_void_p] * 3, c_int)),
    "backward": (None, (POINTER(_Tree), *[c_void_p] * 3, POINTER(_Gradients), POINTER(_Learn), c_void_p, c_void_p, c_int)),
    "flat_work": (c_int64, (POINTER(_Flat), c_int)),
    "flat": (None, (POINTER(_Flat), *[c_void_p] * 3, c_int)),
    "adam": (None, (POINTER(_Adam), c_void_p, c_int64, c_int64, *[c_void_p] * 7, c_int)),
}
"Result and arguments of what csrc calls distcond_..."


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises ConfigError where they cannot be compiled."""
    return load_compiled(Path(__file__).parent / "csrc" / "tree.c", _SIGNATURES)


def serves(x_TQ: Tensor, nodes: NodeTensors) -> bool:
    """Whether the native kernels are chosen, and made for these tensors."""
    return nodes.left_SxP.shape[1] <= MOST_UNITS and computes(x_TQ, nodes.weight_SPQ)


def computes(*tensors: Tensor) -> bool:
    """Whether the native kernels are chosen, and the tensors fp32 on a CPU."""
    return _chosen == "native" and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def looks_up(keys: Tensor) -> bool:
    """Whether the native kernels are chosen, and the keys, int64, on a CPU."""
    return _chosen == "native" and keys.device.type == "cpu"


def leaf_of(gates_TMK: Tensor) -> Tensor:
    """`tree_leaf`, compiled."""
    gates_TMK, (tokens, trees, depth) = gates_TMK.detach().contiguous(), gates_TMK.shape
    leaf_V = torch.empty(tokens * trees, dtype=torch.int64)
    library().distcond_leaf(gates_TMK.data_ptr(), len(leaf_V), trees, depth, leaf_V.data_ptr())
    return leaf_V


def count_nonfinite(gates_TMK: Tensor) -> int:
    """`count_nonfinite`, compiled."""
    gates_TMK = gates_TMK.detach().contiguous()
    return int(library().distcond_nonfinite(gates_TMK.data_ptr(), len(gates_TMK), gates_TMK.shape[1:].numel()))


def find(keys_G: Tensor, runs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`KeyIndex.find`, compiled; fastest where most keys follow a smaller one."""
    keys_G, found_G, threads = keys_G.contiguous(), torch.full_like(keys_G, -1), torch.get_num_threads()
    for keys_N, places_N in runs:
        run = (keys_N.data_ptr(), places_N.data_ptr(), len(keys_N))
        library().distcond_find(keys_G.data_ptr(), len(keys_G), *run, found_G.data_ptr(), threads)
    return found_G


def path_of(leaf_T: Tensor, depth: int, num_trees: int) -> TreePath:
    """`TreePath.of`, compiled."""
    tokens, most = len(leaf_T), sum(min(len(leaf_T), num_trees * 2**level) for level in range(depth + 1))
    order_T, place_T, spare_T = torch.empty(3, tokens, dtype=torch.int64).unbind()
    bounds = torch.empty(depth + 2, dtype=torch.int64)
    nodes_N, start_N, parent_N, count_N = torch.empty(4, most, dtype=torch.int64).unbind()
    outputs = (order_T, place_T, bounds, nodes_N, start_N, parent_N, count_N, spare_T)
    leaf_T = leaf_T.contiguous()
    library().distcond_path(leaf_T.data_ptr(), tokens, depth, num_trees, *(output.data_ptr() for output in outputs))
    ends = bounds.tolist()
    nodes, parents, counts = (PerLevel(part_N[: ends[-1]], ends) for part_N in (nodes_N, parent_N, count_N))
    return TreePath(order_T, place_T, None, FlatPath(bounds, start_N, nodes, parents, counts))


def forward(x_TQ: Tensor, path: TreePath, rows: Sequence[Tensor], nodes: NodeTensors, full_depth: int) -> Tensor:
    """`tree_forward` for at least one token."""
    x_TQ, row_N = x_TQ.contiguous(), PerLevel.of(rows).flat_N
    y_TP, threads = x_TQ.new_empty(len(path.order_T), nodes.bias_SP.shape[1]), torch.get_num_threads()
    source_T = path.source(len(x_TQ))
    tree = _tree(x_TQ, source_T, path, row_N, nodes, full_depth)
    work = _work(library().distcond_work(tree, 0, threads))
    library().distcond_forward(tree, x_TQ.data_ptr(), y_TP.data_ptr(), work.data_ptr(), threads)
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
    flips: Sequence[Flip] = (),
) -> tuple[Tensor, Tensor]:
    """`tree_backward` for at least one token."""
    x_TQ, grad_TP, row_N = x_TQ.contiguous(), grad_TP.contiguous(), PerLevel.of(rows).flat_N
    grad_x_TQ, threads = x_TQ.new_empty(len(grad_TP), x_TQ.shape[1]), torch.get_num_threads()
    learning = [*sorted(gate_levels), *(flip.level for flip in flips)]
    source_T, through_TW = path.source(len(x_TQ)), x_TQ.new_empty(len(grad_TP), len(learning))
    tree = _tree(x_TQ, source_T, path, row_N, nodes, full_depth)
    work = _work(library().distcond_work(tree, len(learning), threads))
    flipped = (_Flip * len(flips))(*(_Flip(flip.level, flip.rows.flat_N.data_ptr(), flip.twin_G.data_ptr()) for flip in flips))
    learn = _Learn(sum(1 << level for level in gate_levels), len(flips), flipped)
    gradients, tokens = _Gradients(*(_rows(part) for part in out)), (x_TQ.data_ptr(), grad_TP.data_ptr(), grad_x_TQ.data_ptr())
    library().distcond_backward(tree, *tokens, gradients, learn, through_TW.data_ptr(), work.data_ptr(), threads)
    if learning == list(range(1, len(rows))):
        return grad_x_TQ, through_TW
    grad_levels_TK = x_TQ.new_zeros(len(grad_TP), len(rows) - 1)
    if learning:
        grad_levels_TK[:, [level - 1 for level in learning]] = through_TW
    return grad_x_TQ, grad_levels_TK


def leaf_product(x_TQ: Tensor, path: TreePath, weight_LQP: Tensor, bias_LP: Tensor) -> Tensor:
    """`leaf_product`, compiled."""
    x_TQ, weight_LQP, bias_LP, nodes = x_TQ.contiguous(), weight_LQP.contiguous(), bias_LP.contiguous(), path.flat()
    y_VP, source_V, threads = x_TQ.new_empty(len(path.order_T), bias_LP.shape[1]), path.source(len(x_TQ)), torch.get_num_threads()
    sizes = (len(y_VP), len(path.nodes.flat_N), len(weight_LQP), x_TQ.shape[1], y_VP.shape[1])
    arrays = (path.order_T, source_V, nodes.start_N, nodes.nodes.flat_N, weight_LQP, bias_LP)
    flat = _Flat(*sizes, *(array.data_ptr() for array in arrays))
    work = _work(library().distcond_flat_work(flat, threads))
    library().distcond_flat(flat, x_TQ.data_ptr(), y_VP.data_ptr(), work.data_ptr(), threads)
    return y_VP


def square(numbers: Tensor) -> float:
    """The sum of the squares, in double precision; the same for any number of threads."""
    numbers = numbers.contiguous()
    return float(library().distcond_square(numbers.data_ptr(), numbers.numel(), torch.get_num_threads()))


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
    sizes, threads = (len(rows_G), grad_G[0].numel()), torch.get_num_threads()
    tensors = (tensor.data_ptr() for tensor in (grad_G, data_S, *moments, *own))
    library().distcond_adam(_Adam(*betas, eps), rows_G.data_ptr(), *sizes, *tensors, threads)


def _tree(x_TQ: Tensor, source_T: Tensor, path: TreePath, row_N: Tensor, nodes: NodeTensors, full_depth: int) -> _Tree:
    """NOTE: holds addresses alone; what they belong to must outlive the call."""
    flat = path.flat()
    sizes = (
        len(source_T),
        x_TQ.shape[1],
        nodes.bias_SP.shape[1],
        nodes.right_SrQ.shape[1],
        nodes.left_SxP.shape[1],
        full_depth,
        path.depth,
    )
    arrays = (path.order_T, source_T, flat.bounds, flat.start_N, flat.parents.flat_N, row_N)
    return _Tree(*sizes, *(array.data_ptr() for array in arrays), _Gradients(*(_rows(part) for part in nodes)))


def _work(numbers: int) -> Tensor:
    """Memory of this thread's own, the same at every call: to take it anew from the system costs more than to use it."""
    if getattr(_own, "work", None) is None or len(_own.work) < numbers:
        _own.work = torch.empty(numbers)
    return _own.work  # type: ignore[no-any-return]


def _rows(tensor_S: Tensor) -> _Rows:
    return _Rows(tensor_S.data_ptr(), tensor_S.stride(0))
