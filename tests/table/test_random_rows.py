"""uniform_rows: a pure function of (seed, node id, place), uniform in [-bound, bound)."""

import pytest
import torch

from distcond.table.random_rows import uniform_rows

NODES = torch.tensor([0, 1, 2, 7, 1000, 2**31, 2**40 + 3, 2**62, 2**63 - 2])


def splitmix(z: int) -> int:
    """SplitMix64's finaliser on unsigned integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def number(seed: int, node: int, place: int) -> float:
    """One number of a row with bound 1, in exact arithmetic."""
    gamma = 0x9E3779B97F4A7C15
    stream = splitmix((splitmix((node + seed * gamma) % 2**64) + gamma) % 2**64)
    return (splitmix((stream + (place + 1) * gamma) % 2**64) >> 40) * 2.0**-23 - 1.0


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_numbers_are_splitmix64_of_seed_node_and_place(seed: int) -> None:
    """Pinned: checkpoints made by one version meet nodes born by another."""
    expected = [[number(seed, node, place) for place in range(4)] for node in NODES.tolist()]
    assert uniform_rows(seed, NODES, 4, 1.0).tolist() == expected  # 24 bits are exact in float32


def test_a_row_does_not_depend_on_what_is_asked_beside_it() -> None:
    whole = uniform_rows(3, NODES, 6, 0.5)
    shuffled = torch.randperm(len(NODES), generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform_rows(3, NODES[shuffled], 6, 0.5), whole[shuffled])
    assert torch.equal(uniform_rows(3, NODES[[4, 4, 4]], 6, 0.5), whole[[4, 4, 4]])
    for place, node in enumerate(NODES):
        assert torch.equal(uniform_rows(3, node[None], 6, 0.5)[0], whole[place])
    assert uniform_rows(3, NODES[:0], 6, 0.5).shape == (0, 6)


@pytest.mark.parametrize("bound", [1.0, 0.25, (3 / 7) ** 0.5])
def test_numbers_fill_the_interval_evenly(bound: float) -> None:
    sample = uniform_rows(5, torch.arange(2000), 50, bound).double() / bound
    assert sample.min() >= -1.0 and sample.max() < 1.0
    # 1e5 numbers of variance 1/3: five standard errors are 5 sqrt(1/3 / 1e5) = 0.0092 for the mean and, the fourth
    # moment being 1/5, 5 sqrt((1/5 - 1/9) / 1e5) = 0.0048 for the variance.
    assert abs(float(sample.mean())) < 0.0092
    assert abs(float(sample.square().mean()) - 1 / 3) < 0.0048
    counts = torch.histc(sample, bins=20, min=-1, max=1)
    assert (counts / 5000 - 1).abs().max() < 5 * (0.95 / 5000) ** 0.5  # five standard errors of a bin


def test_neighbours_in_seed_node_and_place_are_uncorrelated() -> None:
    here = uniform_rows(5, torch.arange(500), 100, 3**0.5).double()  # variance 1
    others = {
        "next seed": uniform_rows(6, torch.arange(500), 100, 3**0.5),
        "next node": uniform_rows(5, torch.arange(1, 501), 100, 3**0.5),
        "next place": uniform_rows(5, torch.arange(500), 101, 3**0.5)[:, 1:],
    }
    for name, other in others.items():
        assert abs(float((here * other.double()).mean())) < 5 / 50_000**0.5, name  # five standard errors of 5e4 products
