"""distcond.ops.grouped: what a loop over rows would give, group by group."""

import torch

from distcond.ops.grouped import add_grouped_product, add_to_groups, grouped_outer, grouped_product

SIZES = [3, 0, 1, 5]  # one group is empty, one has a single row
EXACT = {"rtol": 0, "atol": 1e-13}  # float64; sums of at most 9 products of numbers near 1


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group_of(row: int) -> int:
    return [group for group, size in enumerate(SIZES) for _ in range(size)][row]


def test_each_row_is_multiplied_by_the_matrix_of_its_group() -> None:
    x, out, matrices = random(9, 5), random(9, 2, seed=1), random(4, 5, 2, seed=2)
    expected = torch.stack([out[row] + x[row] @ matrices[group_of(row)] for row in range(9)])
    add_grouped_product(out, x, list(matrices), SIZES)
    torch.testing.assert_close(out, expected, **EXACT)


def test_a_missing_matrix_adds_nothing() -> None:
    x, matrices = random(9, 5), list(random(4, 5, 2, seed=2))
    out, without = random(9, 2, seed=1), random(9, 2, seed=1)
    add_grouped_product(out, x, [None, *matrices[1:]], SIZES)
    add_grouped_product(without, x, [torch.zeros(5, 2, dtype=torch.float64), *matrices[1:]], SIZES)
    assert torch.equal(out, without)


def test_a_product_is_written_with_zeros_for_a_missing_matrix() -> None:
    x, matrices = random(9, 5), random(4, 5, 2, seed=2)
    expected = torch.stack([x[row] @ matrices[group_of(row)] for row in range(9)])
    torch.testing.assert_close(grouped_product(x, list(matrices), 2, SIZES), expected, **EXACT)
    assert not grouped_product(x, [*matrices[:3], None], 2, SIZES)[4:].any()


def test_a_vector_is_added_to_the_rows_of_its_group() -> None:
    out, vectors = random(9, 2), random(4, 2, seed=3)
    expected = torch.stack([out[row] + (vectors[group_of(row)] if group_of(row) != 2 else 0.0) for row in range(9)])
    add_to_groups(out, [*vectors[:2], None, vectors[3]], SIZES)
    torch.testing.assert_close(out, expected, **EXACT)


def test_outer_products_overwrite_with_those_of_the_group_and_with_zeros_for_an_empty_one() -> None:
    left, right = random(9, 2), random(9, 5, seed=1)
    outer = torch.zeros(4, 2, 5, dtype=torch.float64)
    for row in range(9):
        outer[group_of(row)] += left[row][:, None] * right[row]
    got = torch.full_like(outer, torch.nan)
    grouped_outer(got, left, right, SIZES)
    torch.testing.assert_close(got, outer, **EXACT)
