"""Matrix products over runs of rows, each run with a matrix of its own, in a few calls however many runs there are.

For devices on which a call is dear, and dearer still to wait for a number: nothing here depends on values on the host.

Legend: T rows (tokens), G runs, N tiles, B rows of a tile, Q in, P out.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

MOST_GROUPS = 1023
"Of torch's grouped kernel on a GPU (aten/src/ATen/native/cuda/GroupMM.cu)."
MOST_TILE_ROWS = 128
"A tile's matrix is copied for it: with so many rows its product takes as long as the copy on a GPU of 2020 or later, or longer."


class Runs(NamedTuple):
    """Where the runs of rows lie, one after the other; a run may be empty."""

    count_G: Tensor
    "int64, rows of each run."
    end_G: Tensor
    "int64, the row after the last one of each."
    group_T: Tensor
    "int64, run of each row."

    @classmethod
    def of(cls, count_G: Tensor, rows: int) -> Self:
        """Runs of these lengths, `rows` together."""
        group_G = torch.arange(len(count_G), device=count_G.device)
        return cls(count_G, count_G.cumsum(0), torch.repeat_interleave(group_G, count_G, output_size=rows))

    def per_row(self, values_G: Tensor) -> Tensor:
        """A value of each run as one of each of its rows, [T, ...]."""
        return values_G.index_select(0, self.group_T)


def run_product(x_TQ: Tensor, weight_GPQ: Tensor, runs: Runs) -> Tensor:
    """x @ weight^T of the row's run, [T, P]."""
    if len(weight_GPQ) == 1:
        return x_TQ @ weight_GPQ[0].t()
    if _suits_grouped_kernel(x_TQ, *weight_GPQ.shape):
        return torch.nn.functional.grouped_mm(x_TQ.contiguous(), weight_GPQ.mT, offs=runs.end_G.int())
    return tiled_product(x_TQ, weight_GPQ, runs)


def run_outer(left_TP: Tensor, right_TQ: Tensor, runs: Runs) -> Tensor:
    """Sum of the outer products of the rows of each run, left^T @ right, [G, P, Q]; zeros for an empty run.

    In the precision of the rows or, where tiles are added up, in fp32.
    """
    if len(runs.count_G) == 1:
        return (left_TP.t() @ right_TQ)[None]
    if _suits_grouped_kernel(left_TP, len(runs.count_G), left_TP.shape[1], right_TQ.shape[1]):
        return torch.nn.functional.grouped_mm(left_TP.contiguous().t(), right_TQ.contiguous(), offs=runs.end_G.int())
    return tiled_outer(left_TP, right_TQ, runs)


def tiled_product(x_TQ: Tensor, weight_GPQ: Tensor, runs: Runs) -> Tensor:
    """`run_product` in any precision: a batched product of tiles, each with a copy of its run's matrix."""
    tiles = _Tiles.of(runs)
    is_rows = weight_GPQ.stride(-1) == 1  # copied as it lies in memory
    copies_N = (weight_GPQ if is_rows else weight_GPQ.mT).index_select(0, tiles.group_N)
    y_NBP = torch.bmm(tiles.fill(x_TQ), copies_N.mT if is_rows else copies_N)
    return y_NBP.flatten(0, 1).index_select(0, tiles.place_T)


def tiled_outer(left_TP: Tensor, right_TQ: Tensor, runs: Runs) -> Tensor:
    """`run_outer` in any precision; tiles are added up in fp32 at least, which the result then has."""
    tiles = _Tiles.of(runs)
    outer_NPQ = torch.bmm(tiles.fill(left_TP).mT, tiles.fill(right_TQ))
    outer_NPQ = outer_NPQ.to(torch.promote_types(outer_NPQ.dtype, torch.float32))
    return outer_NPQ.new_zeros(len(runs.count_G), *outer_NPQ.shape[1:]).index_add_(0, tiles.group_N, outer_NPQ)


def _suits_grouped_kernel(x_TQ: Tensor, groups: int, *widths: int) -> bool:
    """Whether torch multiplies these by one kernel, and not by a loop on the host.

    That wants bf16 and, of Nvidia's GPUs, one of compute capability 9 or 10 (torch 2.13, GroupedBlas.cpp); rows that begin at
    multiples of 16 bytes.
    """
    if x_TQ.is_cuda and torch.cuda.get_device_capability(x_TQ.device)[0] not in (9, 10):
        return False
    is_aligned = all(width * x_TQ.element_size() % 16 == 0 for width in widths)
    return x_TQ.dtype == torch.bfloat16 and groups <= MOST_GROUPS and is_aligned


class _Tiles(NamedTuple):
    """Runs cut into tiles of B rows, the last one of each run filled up with zeros.

    B is near the mean length of a run, so that at most 3 T rows are multiplied; and as many tiles as there could be at most
    are made, so that nobody has to wait for their number.
    """

    rows: int
    "B."
    group_N: Tensor
    "int64, run of each tile; the last tiles may be of no run, and are zeros for the last one."
    place_T: Tensor
    "int64, where each row stands among those of all tiles."

    @classmethod
    def of(cls, runs: Runs) -> Self:
        groups, total = len(runs.count_G), len(runs.group_T)
        rows = 1
        while rows < MOST_TILE_ROWS and rows * groups < total:
            rows *= 2
        tiles_G = (runs.count_G + rows - 1) // rows
        last_G = tiles_G.cumsum(0)
        tile_N = torch.arange(groups + total // rows, device=runs.count_G.device)
        group_N = torch.searchsorted(last_G, tile_N, right=True).clamp_(max=groups - 1)
        shift_G = (last_G - tiles_G) * rows - (runs.end_G - runs.count_G)
        place_T = torch.arange(total, device=runs.count_G.device) + shift_G.index_select(0, runs.group_T)
        return cls(rows, group_N, place_T)

    def fill(self, x_TQ: Tensor) -> Tensor:
        """The rows in their tiles, [N, B, Q]."""
        tiles = x_TQ.new_zeros(len(self.group_N) * self.rows, x_TQ.shape[1])
        return tiles.index_copy_(0, self.place_T, x_TQ).view(-1, self.rows, x_TQ.shape[1])
