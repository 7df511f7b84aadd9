"""distcond.ops.ragged: what a loop over rows would give, by tiles and by torch's grouped kernel."""

import pytest
import torch
from torch import Tensor

from distcond.ops.ragged import Runs, _Tiles, run_outer, run_product, tiled_outer, tiled_product

SIZES = [
    [3, 0, 1, 5],  # one run is empty, one has a single row
    [9],
    [1] * 7,
    [0, 0, 300, 1],  # longer than a tile may be
    [1] * 1500,  # more than a grouped kernel takes
    [0, 0],
]
WIDTHS = [(8, 16), (5, 3)]  # rows of 16 bytes in bf16, and others


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row_by_row(sizes: list[int], x: Tensor, weight: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    group = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)], dtype=torch.int64)
    product = torch.einsum("tpq,tq->tp", weight[group], x)
    return product, torch.zeros_like(weight).index_add_(0, group, left[:, :, None] * x[:, None])


@pytest.mark.parametrize(("p", "q"), WIDTHS)
@pytest.mark.parametrize("sizes", SIZES)
def test_each_row_meets_the_matrix_of_its_run(sizes: list[int], p: int, q: int) -> None:
    rows, runs = sum(sizes), Runs.of(torch.tensor(sizes), sum(sizes))
    x, weight, left = random(rows, q), random(len(sizes), p, q, seed=1), random(rows, p, seed=2)
    expected = row_by_row(sizes, x, weight, left)
    for product, outer in ((tiled_product, tiled_outer), (run_product, run_outer)):
        # float64; sums of at most 300 products of numbers near 1
        torch.testing.assert_close(product(x, weight, runs), expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(product(x, weight.mT.contiguous().mT, runs), expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(outer(left, x, runs), expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("p", "q"), WIDTHS)
@pytest.mark.parametrize("sizes", SIZES)
def test_short_numbers_are_summed_in_fp32(sizes: list[int], p: int, q: int) -> None:
    rows, runs = sum(sizes), Runs.of(torch.tensor(sizes), sum(sizes))
    x, weight, left = (part.bfloat16() for part in (random(rows, q), random(len(sizes), p, q, seed=1), random(rows, p, seed=2)))
    expected = row_by_row(sizes, x.double(), weight.double(), left.double())
    size = row_by_row(sizes, x.double().abs(), weight.double().abs(), left.double().abs())
    for got, number, most in zip((run_product(x, weight, runs), run_outer(left, x, runs)), expected, size, strict=True):
        # The result is rounded once, by 2**-8, or each tile's share of it; 1e-5 is for the sum in fp32.
        assert ((got - number).abs() <= (2**-8 + 1e-5) * most).all()


def test_tiles_waste_at_most_two_rows_for_each_in_use() -> None:
    """However uneven the runs are: at most 3 T rows are multiplied, at most 2 G matrices copied, beside tiles of full length."""
    for sizes in ([1] * 100 + [400], [3] * 100, [0] * 50 + [1] * 50, [7], [128] * 3):
        total = sum(sizes)
        tiles = _Tiles.of(Runs.of(torch.tensor(sizes), total))
        assert len(tiles.group_N) * tiles.rows <= 3 * total + len(sizes)
        assert len(tiles.group_N) <= 2 * len(sizes) + total // 128
