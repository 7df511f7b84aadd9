"""Nodes and their rows on a GPU, by kernels of its own (Triton): leaves, paths, look-up and Adam, one to three launches each.

Legend: T tokens, V of them for each tree, M trees, K depth, N nodes, S rows stored, W numbers of a row.
"""

import functools
import importlib.util
import math
import subprocess
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from distcond.ops.path import FlatPath, TreePath
from distcond.ops.per_level import PerLevel

BLOCK, ROW_BLOCK = 256, 1024


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels compute this: on a GPU, where Triton works."""
    return all(tensor.is_cuda for tensor in tensors) and is_working(tensors[0].device)


@functools.cache
def is_working(device: torch.device) -> bool:
    """Whether Triton is there, as it is with torch for GPUs, and can compile; if it cannot, one warning says why."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        leaf_of(torch.ones(1, 1, 1, device=device))
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"Triton cannot compile kernels here ({str(error).strip().splitlines()[0]}); trees are computed by torch alone, "
            "several times slower. A C compiler and Python's headers are needed",
            stacklevel=2,
        )
        return False
    return True


def precision() -> str:
    """How fp32 factors are multiplied: as exactly as fp32, or as torch may (`torch.set_float32_matmul_precision`)."""
    is_exact = torch.get_float32_matmul_precision() == "highest"
    return ("ieee" if torch.version.hip else "tf32x3") if is_exact else "tf32"


def leaf_of(gates_TMK: Tensor) -> Tensor:
    """`tree_leaf`."""
    gates_TMK, (tokens, trees, depth) = gates_TMK.detach().contiguous(), gates_TMK.shape
    leaf_V = torch.empty(tokens * trees, dtype=torch.int64, device=gates_TMK.device)
    if len(leaf_V):
        _kernels().leaf[(_ceil(len(leaf_V), BLOCK),)](gates_TMK, leaf_V, len(leaf_V), trees, depth, BLOCK=BLOCK)
    return leaf_V


def path_of(leaf_T: Tensor, depth: int, num_trees: int = 1) -> TreePath:
    """`TreePath.of` for at least one token; the host waits once, for the numbers of nodes."""
    tokens = len(leaf_T)
    sorted_T, order_T = torch.sort(leaf_T, stable=True)
    grid = (_ceil(tokens, BLOCK), depth + 1)
    is_first_LT = leaf_T.new_empty(depth + 1, tokens)
    _kernels().mark[grid](sorted_T, is_first_LT, tokens, depth, BLOCK=BLOCK)
    number_LT = is_first_LT.view(-1).cumsum(0).view(depth + 1, tokens)
    bounds = [0, *(last + 1 for last in number_LT[:, -1].tolist())]
    nodes_N, start_N, parent_N, count_N = leaf_T.new_empty(4, bounds[-1]).unbind()
    _kernels().list_nodes[grid](
        sorted_T, number_LT, nodes_N, start_N, parent_N, count_N, tokens, num_trees, depth, tokens.bit_length(), BLOCK=BLOCK
    )
    place_T = torch.empty_like(order_T).index_copy_(0, order_T, torch.arange(tokens, device=leaf_T.device))
    nodes, parents, counts = (PerLevel(part_N, bounds) for part_N in (nodes_N, parent_N, count_N))
    return TreePath(order_T, place_T, None, FlatPath(torch.tensor(bounds), start_N, nodes, parents, counts), number_LT)


def find(keys_N: Tensor, runs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`KeyIndex.find`."""
    keys_N = keys_N.contiguous()
    found_N = torch.full_like(keys_N, -1)
    for run_keys, run_places in runs:
        if len(keys_N) and len(run_keys):
            _kernels().look_up[(_ceil(len(keys_N), BLOCK),)](
                keys_N, found_N, run_keys, run_places, len(keys_N), len(run_keys), len(run_keys).bit_length(), BLOCK=BLOCK
            )
    return found_N


def adam(
    data_SW: Tensor,
    moments: tuple[Tensor, Tensor],
    rows_N: Tensor,
    grad_NW: Tensor,
    clock_S: Tensor,
    decay_N: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Adam on some rows, in place: one pass over memory.

    clock: earlier updates of each row; decay: a factor for each row, None: 1.
    """
    width = grad_NW[0].numel()
    beta1, beta2 = (math.log2(beta) if beta else -math.inf for beta in betas)
    _kernels().adam[(len(rows_N), _ceil(width, ROW_BLOCK))](
        data_SW, *moments, grad_NW.contiguous(), rows_N, clock_S, decay_N, width, lr, eps,
        beta1=beta1, beta2=beta2, decays=decay_N is not None, BLOCK=min(ROW_BLOCK, 1 << (width - 1).bit_length()),
    )  # fmt: skip


def _kernels() -> ModuleType:
    from distcond.ops import triton_rows

    return triton_rows


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
