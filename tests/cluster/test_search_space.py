import math
import random
from typing import Any

import pytest

from distcond.cluster.search_space import Range, Scale, parse_space, plan_trials
from distcond.errors import ConfigError


def test_grid_gives_every_combination_once() -> None:
    trials = plan_trials(parse_space({"a.x": [1, 2, 3], "b": ["u", "v"]}), num_samples=1, seed=0)
    assert trials == [{"a.x": x, "b": b} for x in (1, 2, 3) for b in ("u", "v")]


def test_each_sample_of_the_ranges_is_crossed_with_the_whole_grid() -> None:
    space = parse_space({"depth": [2, 4], "lr": {"min": 1e-4, "max": 1e-1, "scale": "log"}})
    trials = plan_trials(space, num_samples=5, seed=3)
    assert len(trials) == 2 * 5
    for first, second in zip(trials[::2], trials[1::2], strict=True):
        assert (first["depth"], second["depth"]) == (2, 4)
        assert first["lr"] == second["lr"]
    assert len({trial["lr"] for trial in trials}) == 5


def test_samples_depend_on_the_seed_and_on_their_own_key_alone() -> None:
    rate = {"lr": {"min": 0.0, "max": 1.0}}
    alone = plan_trials(parse_space(rate), num_samples=4, seed=1)
    together = plan_trials(parse_space({"width": {"min": 8, "max": 64}} | rate), num_samples=4, seed=1)
    assert [trial["lr"] for trial in alone] == [trial["lr"] for trial in together]
    assert alone != plan_trials(parse_space(rate), num_samples=4, seed=2)
    (twins,) = plan_trials(parse_space(rate | {"other": rate["lr"]}), num_samples=1, seed=1)
    assert twins["lr"] != twins["other"]


def test_a_choice_takes_one_of_its_values_a_sample() -> None:
    space = parse_space({"kind": {"choice": ["act", "ponder", None]}, "depth": [2, 4]})
    trials = plan_trials(space, num_samples=40, seed=0)
    assert len(trials) == 2 * 40
    assert all(first["kind"] == second["kind"] for first, second in zip(trials[::2], trials[1::2], strict=True))
    assert {trial["kind"] for trial in trials} == {"act", "ponder", None}


@pytest.mark.parametrize("scale", list(Scale))
def test_samples_stay_inside_and_reach_both_ends_of_an_integer_range(scale: Scale) -> None:
    interval, generator = Range(1, 4, scale), random.Random(0)
    values = [interval.sample(generator) for _ in range(300)]
    assert set(values) == {1, 2, 3, 4}
    assert all(isinstance(value, int) for value in values)


def test_log_scale_is_uniform_in_the_logarithm() -> None:
    interval, generator = Range(1e-4, 1e-1, Scale.log), random.Random(0)
    exponents = [math.log10(interval.sample(generator)) for _ in range(3000)]
    # Three decades in equal parts: 1000 of 3000 each, with a standard deviation of 26; 130 is five of them.
    for decade in (-4, -3, -2):
        assert abs(sum(decade <= exponent < decade + 1 for exponent in exponents) - 1000) < 130


def test_sampled_floats_are_short_and_inside() -> None:
    interval, generator = Range(0.00099996, 0.00099999, Scale.linear), random.Random(0)
    values = {interval.sample(generator) for _ in range(50)}
    assert all(0.00099996 <= value <= 0.00099999 for value in values)
    assert len(repr(Range(0.0, 1.0, Scale.linear).sample(generator))) <= len("0.00012345")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "sweep.space is empty"),
        ({"run.name": ["a"]}, "run.name, which is not a trial's to choose"),
        ({"sweep.num_samples": [1]}, "sweep.num_samples, which is not"),
        ({"cluster.name": ["ray"]}, "cluster.name, which is not"),
        ({"train.max_steps": [10]}, "train.max_steps, which is not"),
        ({"seed": 3}, "seed=3 is neither a list"),
        ({"data.name": "parity"}, "data.name='parity' is neither a list"),
        ({"seed": []}, r"seed=\[\] is neither a list"),
        ({"seed": [1, 2, 1]}, "seed has 1 twice"),
        ({"seed": {"min": 1}}, "needs min and max"),
        ({"seed": {"min": 1, "max": 2, "step": 1}}, "needs min and max"),
        ({"seed": {"min": "1", "max": 2}}, "both must be numbers"),
        ({"seed": {"min": True, "max": 2}}, "both must be numbers"),
        ({"optim.lr": {"min": 0.0, "max": math.inf}}, "both must be numbers"),
        ({"seed": {"min": 2, "max": 2}}, "min must be below max"),
        ({"seed": {"min": 1, "max": 2, "scale": "cubic"}}, "use linear or log"),
        ({"optim.lr": {"min": 0.0, "max": 1.0, "scale": "log"}}, "starts above 0"),
    ],
)
def test_a_bad_space_is_refused_in_one_line(space: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_space(space)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "held", "lacked"),
    [
        ([8, [0.9, 0.95], None], [8, [0.9, 0.95], None], [16, [0.9], "8"]),
        ({"choice": ["act", "none"]}, ["act"], ["ponder", 0.5, None]),
        ({"min": 1, "max": 4}, [1, 3, 4], [0, 5, 2.5, "2", True, None]),
        ({"min": 1e-3, "max": 0.5}, [1e-3, 0.25, 0.5], [1e-4, 0.51, [0.25], math.nan]),
    ],
)
def test_a_space_tells_which_points_it_holds(kind: Any, held: list[Any], lacked: list[Any]) -> None:
    space = parse_space({"a.x": kind, "seed": [0]})
    assert [space.lacks({"a.x": value, "seed": 0}) for value in held] == [[]] * len(held)
    assert [space.lacks({"a.x": value, "seed": 0}) for value in lacked] == [["a.x"]] * len(lacked)


def test_a_grid_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="would repeat the same trials"):
        plan_trials(parse_space({"seed": [0, 1]}), num_samples=2, seed=0)
