"""The tests' own tool: no pair of options is lost, and few combinations are left."""

import itertools

from tests.pairs import every_pair


def test_every_two_values_meet_in_few_combinations() -> None:
    choices = (range(5), "abc", "xy", range(4))
    chosen = every_pair(*choices)
    for one, other in itertools.combinations(range(4), 2):
        met = {(combination[one], combination[other]) for combination in chosen}
        assert met == set(itertools.product(choices[one], choices[other]))
    assert 20 <= len(chosen) <= 24 < 120
