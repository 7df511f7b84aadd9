"""Route and Collective among ranks in threads: tokens reach their owners and come back, also where a rank has none."""

import pytest
import torch

from distcond.table import Collective, Route
from tests.thread_ranks import ThreadGroup, run_threads

COUNTS = [[5, 3, 7], [0, 4, 0], [0, 0, 0], [6], [1, 0, 0, 9]]


def make_tokens(rank: int, count: int, ranks: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens that name their rank and place, their leaves (large ones too), their owners."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.stack([torch.full((count,), float(rank)), torch.arange(float(count)), torch.zeros(count)], dim=1).to(dtype)
    leaf = torch.randint(2**62 - 1, (count,), generator=generator)
    leaf[:1] = 2**62 - 1
    return x, leaf, torch.randint(ranks, (count,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_tokens_reach_their_owner_with_their_leaf_and_results_come_back_in_order(counts: list[int], dtype: torch.dtype) -> None:
    ranks = len(counts)
    group = ThreadGroup(ranks)
    given = [make_tokens(rank, count, ranks, dtype) for rank, count in enumerate(counts)]

    def work(rank: int) -> None:
        x, leaf, owner = given[rank]
        route = Route.to(owner, group.collective(rank))
        local, local_leaf = route.dispatch_with_leaf(x, leaf)
        mine = [(x[i], int(leaf[i])) for x, leaf, owner in given for i in range(len(x)) if owner[i] == rank]
        assert len(local) == len(mine) and local.dtype == dtype and local_leaf.dtype == torch.int64
        for token, number, (wanted, wanted_leaf) in zip(local, local_leaf.tolist(), mine, strict=True):
            assert torch.equal(token, wanted) and number == wanted_leaf
        assert torch.equal(route.dispatch(x), local)
        local[:, 2] += rank + 1
        back = route.combine(local)
        expected = x.clone()
        expected[:, 2] = (owner + 1).to(dtype)
        assert torch.equal(back, expected)

    run_threads(work, [group], ranks)


def test_collectives_over_three_ranks() -> None:
    group = ThreadGroup(3)

    def work(rank: int) -> None:
        collective = group.collective(rank)
        value = torch.tensor([1.0 + rank, -rank])
        assert collective.sum_(value.clone()).tolist() == [6.0, -3.0]
        assert collective.max_(value.clone()).tolist() == [3.0, 0.0]
        assert collective.broadcast_(value.clone()).tolist() == [1.0, 0.0]
        assert value.tolist() == [1.0 + rank, -rank]
        in_place = value.clone()
        assert collective.sum_(in_place) is in_place
        keys = [torch.tensor([5, 2**62, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([2, 0])][rank]
        assert collective.gather_union(keys).tolist() == [0, 2, 5, 2**62]
        assert len(collective.gather_union(keys[:0])) == 0

    run_threads(work, [group], 3)


def test_bytes_that_leave_the_rank_are_counted() -> None:
    group = ThreadGroup(2)

    def work(rank: int) -> int:
        collective = group.collective(rank)
        collective.all_to_all(torch.zeros(5, 4), [[2, 3], [4, 1]][rank], [[2, 4], [3, 1]][rank])
        return collective.sent_bytes

    assert run_threads(work, [group], 2) == [3 * 16, 4 * 16]


def test_a_group_of_one_communicates_nothing() -> None:
    alone = Collective()
    value = torch.tensor([3.0, 1.0])
    assert alone.size == 1 and alone.rank == 0
    for call in (alone.sum_, alone.max_, alone.broadcast_):
        assert torch.equal(call(value.clone()), value)
    assert torch.equal(alone.all_to_all(value, [2], [2]), value)
    assert alone.gather_union(torch.tensor([4, 1, 4])).tolist() == [1, 4]
    assert alone.sent_bytes == 0 and alone.elapsed_s == 0.0
