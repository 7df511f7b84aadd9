"""Combinations of options in which every two values meet, where a law says that options do not interact."""

import itertools
from collections.abc import Sequence
from typing import Any


def every_pair(*choices: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A few of itertools.product(*choices): any two values of different choices are together in one of them.

    Greedy: each time the first of those combinations that have most of the pairs which have not met yet.
    """
    combinations = list(itertools.product(*(range(len(values)) for values in choices)))
    pairs = [frozenset(itertools.combinations(enumerate(combination), 2)) for combination in combinations]
    missing, chosen = frozenset[Any]().union(*pairs), []
    while missing:
        best = max(range(len(pairs)), key=lambda at: len(pairs[at] & missing))
        missing -= pairs[best]
        chosen.append(tuple(values[at] for values, at in zip(choices, combinations[best], strict=True)))
    return chosen
