"""Visits are those of the positions; bytes are those counted by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from distcond.config import HaltingConfig, HaltingKind, ModelConfig, Storage, TreeConfig
from distcond.evaluate.touched import bytes_touched, dense_bytes, node_bytes
from distcond.evaluate.visits import Visited, VisitRecorder
from distcond.nn import TreeLinear
from distcond.nn.model import build_learner

FULL, LOW = 4 * (3 * 4 + 4), 4 * (2 * (3 + 4) + 4)
"Bytes of a node of 3 inputs and 4 outputs: whole, and of rank 2; each with a bias."


def layer(**options: object) -> TreeLinear:
    return TreeLinear(3, 4, depth=2, full_depth=1, rank=2, **options)  # type: ignore[arg-type]


def test_nodes_on_the_paths_of_an_example_count_once() -> None:
    visits = Visited(np.array([0, 1, 1, 4, 5, 6]), np.array([0b00, 0b01, 0b00, 0b10, 0b01, 0b10]))
    found = node_bytes(layer(), visits, length=4)
    assert found.tolist() == [2 * FULL + 2 * LOW, 3 * FULL + 2 * LOW]


def test_nodes_that_do_not_exist_are_not_touched() -> None:
    tree, visits = layer(storage="lazy"), Visited(np.array([0, 1]), np.array([0b00, 0b11]))
    assert node_bytes(tree, visits, length=1).tolist() == [FULL, FULL]
    assert tree.table is not None
    tree.table.ensure_rows("full", torch.tensor([1]))
    tree.table.ensure_rows("low", torch.tensor([3]))
    assert node_bytes(tree, visits, length=1).tolist() == [2 * FULL + LOW, FULL]


def test_each_tree_of_a_layer_has_nodes_of_its_own() -> None:
    tree = TreeLinear(3, 4, depth=1, num_trees=2)
    assert node_bytes(tree, Visited(np.array([0, 0]), np.array([0b01, 0b11])), length=1).tolist() == [4 * 4 * (3 * 2 + 2)]


@pytest.mark.parametrize("gate", ["linear", "hash"])
def test_a_model_touches_its_dense_weights_and_gates_once_and_rows_of_its_embedding(gate: str) -> None:
    body = nn.Sequential(nn.Embedding(256, 3), layer(gate=gate), nn.Linear(4, 5))
    gates = 4 * (2 * 3 + 2)  # planes and thresholds
    assert dense_bytes(body) == 4 * (4 * 5 + 5) + gates
    visits = {"1": Visited(np.array([0]), np.array([0]))}
    assert bytes_touched(body, visits, length=1, distinct=1.5) == dense_bytes(body) + 1.5 * 3 * 4 + 2 * FULL + LOW
    assert bytes_touched(body, {}, length=1, distinct=1.5) is None


@pytest.mark.parametrize(
    ("name", "is_text", "halting"),
    [("transformer", True, "act"), ("mlp", True, "ponder"), ("mlp", False, "act"), ("rnn", False, "act"), ("rnn", True, "fixed")],
)
def test_a_position_visits_as_many_leaves_as_it_takes_steps_whoever_is_beside_it(name: str, is_text: bool, halting: str) -> None:
    torch.manual_seed(0)
    tree = TreeConfig(depth=3, num_trees=2, storage=Storage.dense)
    ponder = HaltingConfig(kind=HaltingKind(halting), max_steps=5, halting_bias=-1.0)
    config = ModelConfig(name=name, width=8, heads=2, feed_forward=8, tree=tree, halting=ponder)
    learner = build_learner(config, is_text=is_text, input_size=256 if is_text else 6, output_size=256 if is_text else 1).eval()
    for module in learner.modules():
        if hasattr(module, "halting"):
            nn.init.normal_(module.halting.weight, std=20.0)
    inputs = torch.randint(256, (4, 7)) if is_text else torch.randn(4, 7, 6)
    lengths = torch.tensor([7, 7, 7, 0] if is_text else [3, 7, 1, 0])
    recorder = VisitRecorder(learner.body)

    def ask(rows: slice) -> torch.Tensor:
        recorder.start(lengths[rows], 7)
        with torch.no_grad():
            _, stats = learner.body(inputs[rows], lengths[rows])
        recorder.end(int((lengths[rows] > 0).sum()))
        valid = torch.arange(7) < lengths[rows, None]
        steps: torch.Tensor = stats.steps.view(-1, 7) * valid
        return steps

    steps = ask(slice(0, 4))
    for row in range(3):
        ask(slice(row, row + 1))
    recorder.remove()
    (visits,) = recorder.visited().values()
    counts = np.bincount(visits.position, minlength=6 * 7)
    assert counts[:21].tolist() == (2 * steps[:3]).flatten().tolist()  # two trees
    together, alone = (sorted(zip(visits.position[part], visits.leaf[part], strict=True)) for part in _halves(visits.position))
    assert together == [(position - 21, leaf) for position, leaf in alone]
    assert len({leaf >> 3 for _, leaf in together}) == 2 and (halting == "fixed" or steps.unique().numel() > 2)


def _halves(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return position < 21, position >= 21
