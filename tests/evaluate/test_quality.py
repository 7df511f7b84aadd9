"""Intervals, and the parts of a validation set that are told apart."""

from itertools import pairwise

import numpy as np
import pytest

from distcond.data.graves import logic
from distcond.evaluate.quality import Quality, bootstrap, difficulty, hardest, rare, wilson
from distcond.evaluate.visits import Visited


def text_quality(bits_ET: np.ndarray) -> Quality:
    return Quality("val/bpb", bits_ET.sum(1), np.full(len(bits_ET), bits_ET.shape[1]), bits_ET)


def test_bootstrap_covers_the_mean_and_narrows_as_the_root_of_the_examples() -> None:
    value_E, count_E = np.random.default_rng(1).gamma(2.0, size=800), np.full(800, 2.0)
    widths = []
    for number in (50, 200, 800):
        low, high = bootstrap(value_E[:number], count_E[:number])
        assert low < value_E[:number].sum() / count_E[:number].sum() < high
        widths.append((high - low) / value_E[:number].std())
    assert [wide / narrow for wide, narrow in pairwise(widths)] == pytest.approx([2, 2], rel=0.15)
    assert bootstrap(value_E, count_E) == bootstrap(value_E, count_E)
    assert widths[2] == pytest.approx(2 * 1.96 / 800**0.5 / 2, rel=0.15)  # what the normal distribution says of the mean


@pytest.mark.parametrize(("hits", "number"), [(0, 256), (1, 256), (128, 256), (256, 256)])
def test_an_interval_of_a_share_covers_it_and_is_never_empty(hits: int, number: int) -> None:
    low, high = wilson(hits, number)
    assert 0 <= low <= hits / number <= high <= 1 and high - low > 0.01
    for bound in {low, high} - {hits / number}:  # Wilson's equation: a share there is 1.96 of its standard deviations away
        assert abs(bound - hits / number) == pytest.approx(1.959964 * (bound * (1 - bound) / number) ** 0.5, rel=1e-6)


def test_the_hardest_tenth_is_chosen_without_its_answers_and_the_worst_by_them() -> None:
    bits_ET = np.arange(40.0).reshape(20, 2)
    figures = hardest(text_quality(bits_ET), difficulty_E=-np.arange(20), nll_E=bits_ET.sum(1))
    assert figures == {"val/bpb/hardest_tenth": bits_ET[:2].mean(), "val/bpb/worst_tenth": bits_ET[-2:].mean()}


def test_a_task_is_hard_by_its_measure_inside_of_the_sequence() -> None:
    task = logic(max_length=4, max_gates=3)
    name, mark = difficulty(task)
    batch = task.validation_rows(0, 8)
    assert name == "gates" and mark is not None
    gates_BT = task.measured(batch.inputs)
    assert mark(batch).tolist() == [gates_BT[row, :length].sum() for row, length in enumerate(batch.lengths)]


def test_rare_leaves_are_the_least_visited_ones_that_hold_a_tenth_of_the_visits() -> None:
    bits_ET = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    leaf_V = np.array([0] * 14 + [1] * 3 + [2, 2, 3])  # leaf 3 holds 5%, with leaf 2 it is 15%
    position_V = np.array([*range(8), *range(6), 0, 1, 2, 6, 7, 7])
    figures = rare(text_quality(bits_ET), {"layer": Visited(position_V, leaf_V)}, length=4)
    assert figures == {"val/bpb/rare_leaves": (7 + 8 + 8) / 3, "val/bpb/rare_leaves_pct": pytest.approx(15)}
    of_sequences = Quality("val/sequence_error", np.array([1.0, 0.0]), np.ones(2), None)
    wrong = rare(of_sequences, {"layer": Visited(np.array([0, 1, 4, 5]), np.array([0, 1, 1, 1]))}, length=4)
    assert wrong == {"val/sequence_error/rare_leaves": 1.0, "val/sequence_error/rare_leaves_pct": 25.0}
