"""The Pareto front of two figures, small being good in both."""

import math
import random

from distcond.pareto import pareto_front


def test_pareto_front_by_hand() -> None:
    points = [(1.0, 5.0), (2.0, 2.0), (3.0, 1.0), (3.0, 3.0), (1.0, 6.0), (2.0, 2.0), (math.nan, 0.0)]
    assert pareto_front(points) == [2, 1, 5, 0]


def test_pareto_front_beats_all_others_and_not_itself() -> None:
    generator = random.Random(0)
    points = [(generator.randrange(20), generator.randrange(20)) for _ in range(100)]
    front = set(pareto_front(points))
    for index, (quality, steps) in enumerate(points):
        beaten = any(q <= quality and s <= steps and (q, s) != (quality, steps) for q, s in points)
        assert beaten != (index in front)


def test_pareto_front_of_nothing_is_empty() -> None:
    assert pareto_front([]) == []
