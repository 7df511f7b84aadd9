"""Which of several outcomes, judged by two figures, no other one beats."""

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, by rising second coordinate; small is good in both.

    A point is beaten by one that is no worse in both and better in one. Equal points stand or fall together; points
    with a NaN never stand.
    """
    finite = [index for index, point in enumerate(points) if not any(math.isnan(value) for value in point)]
    front = [index for index in finite if not any(_beats(points[other], points[index]) for other in finite)]
    return sorted(front, key=lambda index: (points[index][1], index))


def _beats(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return first != second and first[0] <= second[0] and first[1] <= second[1]
