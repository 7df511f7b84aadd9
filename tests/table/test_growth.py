"""Admission: a hand-made case in closed form, and how visits add up."""

import torch

from distcond.table import Collective, Growth, SubtreePlan, Visits, admit

ALONE = Collective.alone()


def visits(**count: int) -> Visits:
    """visits(n5=3): three tokens asked for node 5."""
    return Visits(torch.tensor([int(name[1:]) for name in count]), torch.tensor(list(count.values())))


def admitted(growth: Growth, *staged: Visits) -> list[int]:
    for part in staged:
        growth.stage(part)
    (admission,) = admit([(growth, SubtreePlan.make(5, 1))], ALONE, ALONE, ALONE)
    assert admission is not None
    growth.commit(admission)
    return admission.keys_G.tolist()


def test_candidates_come_by_visits_then_node_id_and_only_as_many_as_there_is_room_for() -> None:
    growth = Growth(min_visits=3, max_nodes=6, num_nodes=1)
    assert admitted(growth, visits(n1=2, n2=2), visits(n2=1)) == [2]
    assert dict(zip(*(part.tolist() for part in growth.visits), strict=True)) == {1: 2}
    # Due are 1 with 2 + 1, 5 with 7 and 6 with 3; there is room for four.
    assert admitted(growth, visits(n1=1, n5=7, n6=3)) == [1, 5, 6]
    assert growth.num_nodes == 5 and not growth.is_full and not len(growth.visits.keys_G)
    # One place is left: 3, 4 and 11 have the same visits, 12 has the most, but 13 has as many and comes later.
    assert admitted(growth, visits(n3=4, n4=4, n11=4, n12=5, n13=5)) == [12]
    assert growth.is_full and growth.num_nodes == 6 and not len(growth.visits.keys_G)


def test_a_full_table_counts_tokens_and_takes_part_in_nothing() -> None:
    growth = Growth(min_visits=2, max_nodes=1, num_nodes=1)
    growth.stage(visits(n1=5, n2=4))
    assert admit([(growth, SubtreePlan.make(5, 1))], ALONE, ALONE, ALONE) == [None]
    assert growth.take_capped() == 9 and growth.take_capped() == 0


def test_a_table_without_limits_counts_nothing() -> None:
    growth = Growth()
    growth.stage(visits(n1=5))
    assert not len(growth.take_staged().keys_G)
    assert admit([(growth, SubtreePlan.make(5, 1))], ALONE, ALONE, ALONE) == [None]


def test_visits_that_several_files_know_are_taken_once() -> None:
    joined = Visits.any_of([visits(n1=5, n3=2), visits(n1=5, n4=1), visits()])
    assert joined.keys_G.tolist() == [1, 3, 4] and joined.count_G.tolist() == [5, 2, 1]
