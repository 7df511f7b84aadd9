"""The control of "pondering follows difficulty": it finds what is there, and no more often than it says what is not."""

import numpy as np
import pytest

from distcond.evaluate.chance import WAYS, steps_beside_chance
from distcond.positions import Array, Positions


def positions(steps: Array, loss: Array, asked: Array | None = None) -> Positions:
    asked = np.ones(steps.shape, np.int64) if asked is None else asked
    return Positions(asked > 0, asked, np.zeros_like(asked), loss, loss, steps)


def p_values(steps: Array, loss: Array) -> list[float]:
    figures = steps_beside_chance(positions(steps, loss))
    return [figures[f"control/steps_loss_{way}_p"] for way in WAYS]


@pytest.mark.thorough
def test_steps_that_have_nothing_to_do_with_the_loss_are_seldom_told_from_chance() -> None:
    rng = np.random.default_rng(0)
    found = np.array([p_values(rng.integers(1, 4, (12, 6)), rng.random((12, 6))) for _ in range(40)])
    assert ((found <= 0.1).mean(0) < 0.25).all()  # 40 draws of a share of 0.1: three standard deviations
    assert (np.abs(found.mean(0) - 0.5) < 0.15).all()  # three standard deviations of the mean of 40 uniform p


def test_steps_that_follow_the_loss_are_told_from_chance_in_every_way() -> None:
    rng = np.random.default_rng(1)
    loss = rng.random((16, 8))
    steps = 1 + (4 * (loss + 0.3 * rng.random((16, 8)))).astype(int)
    assert p_values(steps, loss) == [0.005] * 3
    assert p_values(steps.max() + 1 - steps, loss) == [1.0] * 3


def test_steps_that_follow_the_place_alone_are_chance_at_equal_positions() -> None:
    rng = np.random.default_rng(2)
    loss = np.arange(8.0) + rng.random((16, 8))
    steps = np.arange(1, 9) + rng.integers(0, 2, (16, 8))
    figures = steps_beside_chance(positions(steps, loss))
    assert figures["control/steps_loss_shuffled_p"] == figures["control/steps_loss_within_sequences_p"] == 0.005
    assert figures["control/steps_loss_at_equal_positions_p"] > 0.05
    low, high = (figures[f"control/steps_loss_at_equal_positions_{end}"] for end in ("low", "high"))
    assert 0.8 < low <= figures["control/steps_loss_rank_correlation"] <= high


def test_only_whole_sequences_are_a_fair_control_where_neighbours_are_alike() -> None:
    rng = np.random.default_rng(3)
    made = [(rng.integers(1, 9, (12, 1)).repeat(8, 1), rng.random((12, 1)).repeat(8, 1)) for _ in range(30)]
    found = np.array([p_values(steps, loss) for steps, loss in made])
    assert (found[:, 0] <= 0.05).mean() > 0.2  # where 0.05 are to be
    assert (found[:, 2] <= 0.05).mean() < 0.2


def test_only_positions_with_a_target_count_and_sequences_change_places_with_their_like() -> None:
    rng = np.random.default_rng(4)
    steps, loss, asked = rng.integers(1, 4, (6, 5)), rng.random((6, 5)), np.ones((6, 5), np.int64)
    asked[np.arange(6), rng.integers(0, 5, 6)] = 0
    figures = steps_beside_chance(positions(steps, loss, asked))
    changed = steps_beside_chance(positions(np.where(asked, steps, 9), np.where(asked, loss, -1), asked))
    assert figures == changed
    asked = np.tril(np.ones((5, 5), np.int64))  # no two sequences are as long: their order cannot change
    alone = steps_beside_chance(positions(steps[:5], loss[:5], asked))
    assert alone["control/steps_loss_at_equal_positions_p"] == 1.0


def test_steps_that_are_all_equal_are_compared_with_nothing() -> None:
    assert steps_beside_chance(positions(np.full((4, 3), 2), np.random.default_rng(5).random((4, 3)))) == {}
