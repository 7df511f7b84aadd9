"""Configuration of a model: halting's options, their meaning for each kind, and what is refused."""

import math
from typing import Any

import pytest

from distcond.config import HaltingConfig, ModelConfig, TreeConfig
from distcond.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "model.halting.max_steps=0 is below 1"),
        ({"epsilon": 0.0}, r"model.halting.epsilon=0.0 is outside \(0, 1\)"),
        ({"epsilon": 1.0}, r"model.halting.epsilon=1.0 is outside \(0, 1\)"),
        ({"time_penalty": -0.1}, "model.halting.time_penalty=-0.1 is negative"),
        ({"kind": "ponder", "prior_steps": 1.0}, "model.halting.prior_steps=1.0 is not above 1"),
        ({"kind": "ponder", "prior_weight": 0.0}, "model.halting.prior_weight=0.0 is not positive"),
        ({"kind": "ponder", "time_penalty": 0.1}, "model.halting.time_penalty=0.1 has no meaning for kind=ponder"),
        ({"kind": "act", "prior_steps": 5.0}, "model.halting.prior_steps=5.0 needs kind=ponder"),
        ({"kind": "act", "target_steps": 0.9}, "model.halting.target_steps=0.9 is outside 1..100"),
        ({"kind": "act", "target_steps": 5.0, "max_steps": 4}, "model.halting.target_steps=5.0 is outside 1..4"),
        ({"kind": "act", "target_steps": 2.0, "time_penalty": 0.0}, "finds the penalty itself, but time_penalty=0.0"),
        ({"kind": "ponder", "target_steps": 2.0, "prior_steps": 3.0}, "finds the penalty itself, but prior_steps=3.0"),
        ({"kind": "fixed", "target_steps": 2.0}, "model.halting.target_steps=2.0 needs kind=act or ponder"),
    ],
)
def test_impossible_halting_is_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HaltingConfig(**options)


def test_what_is_left_out_has_the_published_value_of_its_kind() -> None:
    act, ponder = HaltingConfig(kind="act"), HaltingConfig(kind="ponder")
    assert (act.least_left, ponder.least_left) == (0.01, 0.05)
    assert HaltingConfig(kind="ponder", epsilon=0.2).least_left == 0.2
    assert (act.initial_penalty, HaltingConfig(kind="act", time_penalty=0.0).initial_penalty) == (0.001, 0.0)
    assert HaltingConfig(kind="act", target_steps=2.0).initial_penalty == 0.0
    assert ponder.initial_penalty == pytest.approx(-0.01 * math.log(1 - 0.2))


def test_every_model_names_the_layers_that_may_be_trees_and_the_first_is_one() -> None:
    assert {name: ModelConfig(name=name).tree_layers for name in ("transformer", "rnn", "mlp")} == {
        "transformer": ["up"],
        "rnn": ["linear"],
        "mlp": ["linear"],
    }
    assert ModelConfig(tree=TreeConfig(layers=["merge", "up"])).tree_layers == ["merge", "up"]


@pytest.mark.parametrize(
    ("model", "tree", "message"),
    [
        ({}, {"layers": ["head"]}, r"layers=\['head'\]: head is no .* of model.name=transformer.* up, down, qkv, merge"),
        ({}, {"layers": ["up", "up"]}, r"layers=\['up', 'up'\]: up is there twice; use"),
        ({"name": "rnn"}, {"layers": ["up"]}, "up is no layer of model.name=rnn; use some of linear, each once"),
        ({"width": 8}, {"layers": ["up", "merge"], "num_trees": 16}, "num_trees=16 does not divide the 8 outputs .* layer merge"),
        ({"width": 8}, {"layers": ["up"], "gate": "sign", "depth": 9}, "takes 9 bits .* from the inputs of up, which has 8"),
    ],
)
def test_layers_that_cannot_be_trees_are_refused_in_a_line(model: dict[str, Any], tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**model, tree=TreeConfig(**tree))
    if tree.get("gate") == "sign":
        ModelConfig(**model, tree=TreeConfig(**{**tree, "layers": ["down"]}))  # whose inputs are more
