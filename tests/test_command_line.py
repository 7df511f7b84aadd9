"""A configuration as a command line: composing the line gives the configuration back."""

import random
from pathlib import Path
from typing import Any

import pytest

from distcond.command_line import overrides_of, train_line
from distcond.compose import compose
from distcond.config import Config
from tests.helpers import changed, small_config

TEXTS = [
    *("plain", "", "a b", "it's", '"quoted"', "a,b", "[x]", "{y}", "a=b", "null", "true", "1e3", "42", "~/x", "a:b", "ü"),
    *("a\\b", "a\\'b", "a\\\\'b", "end\\", "end\\\\", "\\'"),
]

PLACES = ("tracking__project", "tracking__group", "data__path", "data__subset", "data__column", "cluster__partition")
"Keys that take any text."


def test_nothing_differs_from_what_is_composed_without_a_word() -> None:
    assert overrides_of(compose([])) == []


def test_what_was_typed_comes_back() -> None:
    words = ["model=rnn", "data=parity", "optim=adam", "optim.lr=0.0003", "model.halting.kind=act", "run.name=a"]
    config = compose(words)
    assert compose(overrides_of(config)) == config
    assert train_line(config, {"train.max_steps": 7}).endswith("train.max_steps=7")


@pytest.mark.parametrize("first", range(0, len(TEXTS), len(PLACES)))
def test_any_text_comes_back(first: int) -> None:
    texts = dict(zip(PLACES, TEXTS[first:], strict=False))
    config = changed(compose([]), data__files=[*texts.values(), "b"], **texts)
    assert compose(overrides_of(config)) == config


def test_free_mappings_and_missing_values_come_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5}, "prescale_gradients": False}
    config = changed(small_config(tmp_path), optim__deepspeed=options, train__peak_tflops=None, cluster__shard_level=3)
    assert compose(overrides_of(config)) == config


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.thorough
def test_random_changes_come_back(seed: int) -> None:
    generator = random.Random(seed)
    choices: dict[str, list[Any]] = {
        "model__width": [8, 64], "model__tree__depth": [0, 9], "optim__lr": [1e-7, 0.1234567], "optim__betas": [[0.5, 0.75]],
        "data__cache_dir": TEXTS,
        "train__peak_tflops": [None, 3.5], "train__profile": [True], "cluster__rebalance_every": [None, 4],
    }  # fmt: skip
    config: Config = changed(compose([]), **{key: generator.choice(values) for key, values in choices.items()})
    assert compose(overrides_of(config)) == config
