"""distcond.ops.grouped: what a loop over rows would give, group by group."""

import torch

from distcond.ops.grouped import add_grouped_product, grouped_outer, grouped_sum

OFFSETS = [0, 3, 3, 4, 9]  # one group is empty, one has a single row
EXACT = {"rtol": 0, "atol": 1e-13}  # float64; sums of at most 9 products of numbers near 1


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group_of(row: int) -> int:
    return next(group for group in range(len(OFFSETS) - 1) if OFFSETS[group] <= row < OFFSETS[group + 1])


def test_each_row_is_multiplied_by_the_matrix_of_its_group() -> None:
    x, out, matrices = random(9, 5), random(9, 2, seed=1), random(4, 5, 2, seed=2)
    expected = torch.stack([out[row] + x[row] @ matrices[group_of(row)] for row in range(9)])
    add_grouped_product(out, x, list(matrices), OFFSETS)
    torch.testing.assert_close(out, expected, **EXACT)


def test_a_missing_matrix_adds_nothing() -> None:
    x, matrices = random(9, 5), list(random(4, 5, 2, seed=2))
    out, without = random(9, 2, seed=1), random(9, 2, seed=1)
    add_grouped_product(out, x, [None, *matrices[1:]], OFFSETS)
    add_grouped_product(without, x, [torch.zeros(5, 2, dtype=torch.float64), *matrices[1:]], OFFSETS)
    assert torch.equal(out, without)


def test_outer_products_and_sums_overwrite_with_those_of_the_group_and_with_zeros_for_an_empty_one() -> None:
    left, right = random(9, 2), random(9, 5, seed=1)
    outer, total = torch.zeros(4, 2, 5, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    for row in range(9):
        outer[group_of(row)] += left[row][:, None] * right[row]
        total[group_of(row)] += left[row]
    got_outer, got_total = torch.full_like(outer, torch.nan), torch.full_like(total, torch.nan)
    grouped_outer(got_outer, left, right, OFFSETS)
    grouped_sum(got_total, left, OFFSETS)
    torch.testing.assert_close(got_outer, outer, **EXACT)
    torch.testing.assert_close(got_total, total, **EXACT)
