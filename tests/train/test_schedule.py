"""The learning rate follows its closed form."""

import math

import pytest

from distcond.config import OptimConfig, Schedule
from distcond.train.schedule import learning_rate


def test_warm_up_is_a_straight_line_that_ends_at_the_peak() -> None:
    optim = OptimConfig(lr=0.4, warmup_steps=4)
    assert [learning_rate(optim, step, 100) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    for schedule in Schedule:
        assert learning_rate(OptimConfig(lr=0.4, schedule=schedule), 0, 100) == 0.4


def test_cosine_falls_from_the_peak_to_zero_at_the_end() -> None:
    optim = OptimConfig(lr=0.4, warmup_steps=10, schedule=Schedule.cosine)
    assert learning_rate(optim, 10, 110) == 0.4
    assert learning_rate(optim, 60, 110) == pytest.approx(0.2)  # half-way
    for step in (25, 35, 85):
        angle = math.pi * (step - 10) / 100
        assert learning_rate(optim, step, 110) == pytest.approx(0.4 * math.cos(angle / 2) ** 2)  # half-angle formula
    assert learning_rate(optim, 110, 110) == pytest.approx(0.0, abs=1e-16)
    assert 0 < learning_rate(optim, 109, 110) < 1e-3 * 0.4  # the last step still moves


def test_cosine_stays_at_zero_when_a_run_is_no_longer_than_its_warm_up() -> None:
    optim = OptimConfig(lr=0.4, warmup_steps=5, schedule=Schedule.cosine)
    assert learning_rate(optim, 4, 5) == 0.4
    assert learning_rate(optim, 200, 5) == pytest.approx(0.0, abs=1e-16)
