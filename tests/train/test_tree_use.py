"""What is written of the trees at a validation: every token of every rank, and the norms of nodes wherever they are."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from distcond.compose import save_config
from distcond.config import Config
from distcond.nn import TreeLinear
from distcond.opened import open_run
from distcond.train.metrics import tree_usage
from distcond.train.table_files import tree_layers
from distcond.train.tree_use import DEEPEST, MOST_TREES, TreeUse, _chosen
from tests.helpers import metric_rows, small_config, train_run
from tests.thread_ranks import Groups
from tests.trees import random_tree, tokens

THOROUGH = pytest.mark.thorough
APART = {f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")}
"ZeRO 3 leaves no parameter whole that is not in use."


def trees_in(config: Config) -> list[dict[str, Any]]:
    file = Path(config.run.dir) / config.run.name / "eval" / "trees.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_norms(config: Config, step: int, layers: list[dict[str, Any]]) -> None:
    """Against the checkpoint of the same step, which has the nodes of all ranks."""
    folder = Path(config.run.dir) / config.run.name
    save_config(config, folder / "config.yaml")
    held = tree_layers(open_run(folder, step).learner)
    assert [layer["layer"] for layer in layers] == list(held)
    for layer in layers:
        for tree, level, prefix, _, _, norm in layer["nodes"]:
            weight = held[layer["layer"]].node_weight(2**level - 1 + prefix, tree)
            # Of four digits, of weights that ZeRO may round on their way.
            assert norm == pytest.approx(float(weight.detach().norm()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("num_workers", "stage", "changes"),
    [
        (1, 1, {"model__tree__depth": 8}),
        (2, 1, {"model__tree__depth": 5, "model__tree__num_trees": 2}),
        pytest.param(2, 3, {"model__tree__storage": "dense", "optim__deepspeed": {"zero_optimization": APART}}, marks=THOROUGH),
        pytest.param(2, 3, {"model__tree__depth": 5}, marks=THOROUGH),
    ],
)
def test_each_validation_tells_the_tokens_since_the_last_one_and_the_norms_of_all_ranks(
    num_workers: int, stage: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = small_config(tmp_path, cluster__num_workers=num_workers, optim__zero_stage=stage, **changes)
    train_run(config)
    kept = trees_in(config)
    assert [line["step"] for line in kept] == [2, 4]
    steps = {row["step"]: row["ponder/steps"] for row in metric_rows(tmp_path / "run") if "ponder/steps" in row}
    for line in kept:
        for layer in line["layers"]:
            nodes = layer["nodes"]
            # Parity is one element: eight positions a step, each as often as it ponders.
            assert layer["tokens"] == round(8 * (steps[line["step"] - 1] + steps[line["step"]]))
            roots = [node for node in nodes if node[1] == 0]
            assert [node[:5] for node in roots] == [[tree, 0, 0, 0, layer["tokens"]] for tree in range(layer["trees"])]
            assert max(node[1] for node in nodes) == min(layer["depth"], DEEPEST)
        check_norms(config, line["step"], line["layers"])


@pytest.mark.thorough
def test_a_resumed_run_tells_each_validation_once_and_no_samples_mean_no_trees(tmp_path: Path) -> None:
    for steps in (2, 4):
        config = small_config(tmp_path, train__max_steps=steps)
        train_run(config)
    assert [line["step"] for line in trees_in(config)] == [2, 4]
    train_run(small_config(tmp_path, run__name="none", tracking__samples=0, train__max_steps=2))
    assert not (tmp_path / "none" / "eval").exists()


@pytest.mark.parametrize(("depth", "num_trees"), [(3, 1), (12, 1), (4, 6)])
def test_tokens_of_all_ranks_are_counted_by_prefix(depth: int, num_trees: int) -> None:
    groups = Groups(world=2, expert=1)

    def work(rank: int) -> tuple[list[list[int]], list[int], list[list[int]]]:
        layer = random_tree(depth, sizes=(8, 12), num_trees=num_trees, full_depth=0, rank=1, storage="lazy")
        layer.records_loads = True
        use, seen = TreeUse(), list[list[int]]()
        for turn in range(2):
            x_TQ = tokens(30 + 10 * rank, 8, seed=2 * turn + rank)
            layer.train()(x_TQ).sum().backward()
            seen += layer.leaf(x_TQ).tolist()
            world = groups.world.collective(rank)
            tree_usage(torch.nn.ModuleDict({"layer": layer}), world, world, use.add)
        rows, keys = _chosen(layer, use.take("layer", layer), 1.0)
        assert not use.take("layer", layer).any()
        return rows, keys, seen

    (rows, keys, first), (others, _, second) = groups.run(work)
    assert rows == others
    counts = Counter(
        (tree, level, leaf >> (depth - level))
        for leaves in first + second
        for tree, leaf in enumerate(leaves[:MOST_TREES])
        for level in range(min(depth, DEEPEST) + 1)
    )
    assert {(tree, level, prefix): own for tree, level, prefix, _, own in rows} == counts
    ends = dict[tuple[int, int], int]()
    for tree, level, _, left, own in rows:  # in the order of their prefixes, without a gap
        assert left == ends.get((tree, level), 0)
        ends[tree, level] = left + own
    layer = TreeLinear(8, 12, depth, num_trees=num_trees, storage="lazy")
    assert keys == [num_trees * (2**level - 1) + (tree << level) + prefix for tree, level, prefix, _, _ in rows]
    assert max(keys) < layer.layout.num_ids


def test_nodes_that_few_tokens_saw_are_left_out() -> None:
    layer, use = TreeLinear(4, 4, 2, storage="lazy"), TreeUse()
    use.add("layer", layer, torch.tensor([0, 1, 3]), torch.tensor([90, 4, 6]))
    rows, _ = _chosen(layer, use.take("layer", layer), 5)
    assert rows == [[0, 0, 0, 0, 100], [0, 1, 0, 0, 94], [0, 1, 1, 94, 6], [0, 2, 0, 0, 90], [0, 2, 3, 94, 6]]
