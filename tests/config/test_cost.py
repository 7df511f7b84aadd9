"""Closed forms of cost against built models: parameters counted one by one, multiplications counted as they happen."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distcond.config import (
    CellName,
    GateGradient,
    GateName,
    HaltingConfig,
    HaltingKind,
    ModelConfig,
    ModelName,
    Storage,
    TreeConfig,
)
from distcond.config.cost import model_cost, tree_cost
from distcond.nn.model import Learner, build_learner
from tests.pairs import every_pair
from tests.trees import random_tree, seed_cpu

TREES: list[dict[str, Any]] = [
    {"depth": 0},
    {"depth": 3},
    {"depth": 3, "full_depth": 1, "rank": 2},
    {"depth": 3, "full_depth": 0, "rank": 1},
    {"depth": 3, "gate": GateName.hash},
    {"depth": 3, "gate": GateName.sign},
    {"depth": 3, "gate_gradient": GateGradient.none},
    {"depth": 3, "full_depth": 1, "rank": 2, "gate_gradient": GateGradient.magnitude},
    {"depth": 3, "full_depth": 1, "rank": 2, "num_trees": 4},
]
MODELS: list[dict[str, Any]] = [
    {"name": ModelName.transformer, "width": 8, "heads": 2, "feed_forward": 20},
    {"name": ModelName.transformer, "width": 8, "heads": 2, "feed_forward": 20, "layers": ["merge", "down"]},
    {"name": ModelName.transformer, "width": 8, "heads": 2, "feed_forward": 20, "layers": ["qkv", "merge", "up", "down"]},
    {"name": ModelName.rnn, "width": 8, "cell": CellName.tanh},
    {"name": ModelName.rnn, "width": 8, "cell": CellName.lstm},
    {"name": ModelName.rnn, "width": 8, "cell": CellName.gru},
    {"name": ModelName.rnn, "width": 8, "cell": CellName.gru, "is_text": True},
    {"name": ModelName.mlp, "width": 8},
    {"name": ModelName.mlp, "width": 8, "window": 3, "is_text": True},
]
VECTORS, TEXT = {"is_text": False, "input_size": 5, "output_size": 3}, {"is_text": True, "input_size": 256, "output_size": 256}
BATCH, LENGTH = 2, 7


def sizes_of(model: dict[str, Any]) -> dict[str, Any]:
    return TEXT if model.get("is_text", model["name"] == ModelName.transformer) else VECTORS


def build(config: ModelConfig, sizes: dict[str, Any]) -> Learner:
    seed_cpu(0)
    return build_learner(config, **sizes)


def config_of(model: dict[str, Any], tree: dict[str, Any], storage: Storage, kind: HaltingKind) -> ModelConfig:
    chosen = TreeConfig(**tree, layers=model.get("layers", []), storage=storage)
    model = {key: value for key, value in model.items() if key not in {"is_text", "layers"}}
    return ModelConfig(**model, tree=chosen, halting=HaltingConfig(kind=kind, max_steps=3))


@pytest.mark.parametrize(("tree", "model", "kind"), every_pair(TREES, MODELS, list(HaltingKind)))
def test_parameters_are_those_of_the_built_model(model: dict[str, Any], tree: dict[str, Any], kind: HaltingKind) -> None:
    config, sizes = config_of(model, tree, Storage.dense, kind), sizes_of(model)
    cost = model_cost(config, **sizes, length=LENGTH)
    assert cost.dense_parameters == sum(parameter.numel() for parameter in build(config, sizes).parameters())
    assert cost.node_parameters == 0
    lazy_config = config_of(model, tree, Storage.lazy, kind)
    lazy_cost, lazy = model_cost(lazy_config, **sizes, length=LENGTH), build(lazy_config, sizes)
    assert lazy_cost.dense_parameters == sum(parameter.numel() for parameter in lazy.parameters())
    assert lazy_cost.dense_parameters + lazy_cost.node_parameters == cost.dense_parameters
    assert (lazy_cost.macs_per_step, lazy_cost.macs_per_position) == (cost.macs_per_step, cost.macs_per_position)


@pytest.mark.parametrize("tree", TREES)
def test_a_table_in_which_every_node_exists_holds_the_numbers_of_the_closed_form(tree: dict[str, Any]) -> None:
    config = TreeConfig(**tree)
    shape = {"num_trees": config.num_trees, "full_depth": config.full_depth, "rank": config.rank}
    layer = random_tree(config.depth, dtype=torch.float32, storage="lazy", **shape)
    assert layer.table is not None
    assert tree_cost(5, 4, config).node_parameters == sum(store.data.numel() for _, store in layer.table.stores())


class Macs(TorchDispatchMode):
    """Counts the multiply-accumulate operations of matrix products as they are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0].rstrip("_")
        if name in {"mm", "addmm", "bmm", "baddbmm"}:
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1]
        elif "dot_product" in name:
            self.attention += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("storage", ["dense", "lazy"])
@pytest.mark.parametrize(
    ("tree", "by_hand"),
    [
        ({"depth": 0}, 4 * 5),
        ({"depth": 3}, 3 * 5 + 4 * (4 * 5)),
        ({"depth": 3, "full_depth": 1, "rank": 2}, 3 * 5 + 2 * (4 * 5) + 2 * 2 * (4 + 5)),
        ({"depth": 2, "full_depth": 0, "rank": 1, "gate": GateName.hash}, 2 * 5 + 4 * 5 + 2 * (4 + 5)),
        ({"depth": 3, "gate": GateName.sign}, 4 * (4 * 5)),
        ({"depth": 3, "full_depth": 1, "rank": 2, "num_trees": 2}, 2 * 3 * 5 + 2 * (4 * 5) + 2 * 2 * (2 * 5 + 4)),
    ],
)
def test_macs_of_a_tree_are_its_gates_and_the_products_on_one_path(tree: dict[str, Any], by_hand: int, storage: str) -> None:
    config = TreeConfig(**tree)
    assert tree_cost(5, 4, config).macs == by_hand
    shape = {"num_trees": config.num_trees, "full_depth": config.full_depth, "rank": config.rank, "gate": config.gate.value}
    layer = random_tree(config.depth, dtype=torch.float32, storage=storage, bias=False, **shape)
    with Macs() as macs, torch.no_grad():
        layer(torch.randn(10, 5))
    assert macs.count == 10 * by_hand


@pytest.mark.parametrize(("model", "depth", "kind"), every_pair(MODELS, [0, 3], list(HaltingKind)))
def test_macs_of_a_model_are_those_it_carries_out(
    model: dict[str, Any], depth: int, kind: HaltingKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Levels that are added up before they are multiplied would be counted as one, and so would the input of all ponder steps.
    monkeypatch.setattr("distcond.ops.path.TOKENS_PER_MERGED_NODE", 10**9)
    monkeypatch.setattr("distcond.nn.recurrent._is_plain", lambda _: False)
    config, sizes = config_of(model, {"depth": depth}, Storage.dense, kind), sizes_of(model)
    cost, learner = model_cost(config, **sizes, length=LENGTH), build(config, sizes).eval()
    inputs = torch.randn(BATCH, LENGTH, sizes["input_size"])
    if sizes["is_text"]:
        inputs = torch.randint(256, (BATCH, LENGTH), dtype=torch.uint8)
    with Macs() as macs, torch.no_grad():
        _, stats = learner.body(inputs, torch.full((BATCH,), LENGTH))
    steps, positions = int(stats.steps.sum()), BATCH * LENGTH
    counted = macs.count
    if config.name == ModelName.transformer:
        # Position t attends to t positions: t x width for the scores and as much for the mixture, by hand over t = 1..T.
        assert macs.attention > 0 and len(stats.steps.unique()) == 1
        counted += steps * sum(2 * t * config.width for t in range(1, LENGTH + 1)) // LENGTH
    assert counted == positions * cost.macs(steps / positions)
    assert steps == positions * {HaltingKind.none: 1, HaltingKind.fixed: 3, HaltingKind.act: 2, HaltingKind.ponder: 1}[kind]
