"""Metrics: pooled over ranks they are what one would count by hand over all tokens."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcond.nn import TreeLinear
from distcond.nn.model import SUMS
from distcond.table import Collective, SubtreePlan
from distcond.train.metrics import is_better, ponder, quality, tree_usage
from tests.helpers import run_ranks
from tests.train.foreign import WIDTH, Theirs, start, train
from tests.train.traces import rows_by_node
from tests.trees import random_tree, tokens


def sums(**figures: float) -> Tensor:
    return torch.tensor([figures.get(name, 0.0) for name in SUMS], dtype=torch.float64)


def test_quality_of_text_is_bits_and_errors_per_byte() -> None:
    row = quality(sums(nll=8 * math.log(2), elements=4, element_errors=1, sequences=2), is_text=True, prefix="val")
    assert row == pytest.approx({"val/bpb": 2.0, "val/element_error": 0.25})


def test_a_run_that_begins_with_nan_still_finds_its_best() -> None:
    assert not is_better(math.nan, None)
    assert is_better(3.0, None)
    assert not is_better(math.nan, {"value": 3.0})
    assert [is_better(value, {"value": 3.0}) for value in (2.9, 3.0, 3.1)] == [True, False, False]


def test_quality_of_a_task_is_per_sequence() -> None:
    figures = sums(nll=6.0, elements=12, element_errors=3, sequences=5, asked_sequences=4, sequence_errors=2)
    row = quality(figures, is_text=False, prefix="val")
    assert row == pytest.approx({"val/nll": 1.2, "val/sequence_error": 0.5, "val/element_error": 0.25})


def test_ponder_figures_are_per_position() -> None:
    row = ponder(sums(positions=4, ponder_steps=10, remainder=2, ponder_cost=12))
    assert row == {"ponder/steps": 2.5, "ponder/remainder": 0.5, "ponder/cost": 3.0}


def test_nothing_counted_is_not_a_number() -> None:
    assert all(math.isnan(value) for value in quality(sums(), is_text=True, prefix="val").values())


def usage_of_a_loop(expert_parallel_size: int) -> tuple[dict[str, float], dict[str, list[int]], dict[str, set[int]]]:
    """What `tree_usage` says of two steps, the leaf of every token this rank routed, and the nodes it holds."""
    leaves: dict[str, list[int]] = {}
    engine = start(1, accumulation=2, expert_parallel_size=expert_parallel_size)
    with torch.no_grad():  # on rank r, r + 1 rows of each of two layers, outside of training
        for layer in (engine.module.deep, engine.module.plain):
            layer(torch.full((engine.tables.world.rank + 1, WIDTH), math.nan))
    for name, layer in engine.module.named_modules():
        if isinstance(layer, TreeLinear):
            layer.records_loads = True

            def note(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                assert isinstance(module, TreeLinear)
                leaves.setdefault(name, []).extend(module.leaf(inputs[0]).flatten().tolist())

            layer.register_forward_pre_hook(note)
    train(engine, 0, 2)
    usage = tree_usage(engine.module, engine.tables.world, engine.tables.expert)
    nodes: dict[str, set[int]] = {}
    for part, rows in rows_by_node(engine.module).items():
        nodes.setdefault(part.split("/")[0], set()).update(rows)
    return usage, leaves, nodes


def by_hand(by_rank: list[dict[str, list[int]]], nodes: dict[str, set[int]], expert_parallel_size: int) -> dict[str, float]:
    """The same figures from every single token and node, mean over layers."""
    rows: list[dict[str, float]] = []
    trees = {name: layer for name, layer in Theirs().named_modules() if isinstance(layer, TreeLinear)}
    for name, layer in trees.items():
        counts = Counter(leaf for leaves in by_rank for leaf in leaves[name])
        total = sum(counts.values())
        plan = SubtreePlan.make(layer.depth, expert_parallel_size if layer.table is not None else 1)
        served = Counter[int]()
        for rank, leaves in enumerate(by_rank):
            block = rank - rank % expert_parallel_size
            owners = plan.owner(torch.tensor(leaves[name])).tolist() if plan.is_sharded else [rank - block] * len(leaves[name])
            served.update(block + owner for owner in owners)
        rows.append(
            {
                "tree/leaf_entropy_nats": -sum(n / total * math.log(n / total) for n in counts.values()),
                "tree/load_max_over_mean": max(counts.values()) / (total / 2**layer.depth),
                "tree/dead_leaves": 2**layer.depth - len(counts),
                "tree/capped_pct": 0.0,
                "tree/rank_load_max_over_mean": max(served.values()) / (total / len(by_rank)),
            }
        )
    exist = sum(len(nodes[name]) if layer.table is not None else 2 ** (layer.depth + 1) - 1 for name, layer in trees.items())
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} | {"tree/materialized_nodes": exist}


@pytest.mark.parametrize(("world_size", "expert_parallel_size"), [(1, 1), (4, 2)])
def test_tree_usage_counts_every_token_of_every_rank_once(world_size: int, expert_parallel_size: int) -> None:
    ranks: list[Any] = run_ranks(usage_of_a_loop, world_size, expert_parallel_size)
    nodes: dict[str, set[int]] = {}
    for usage, _, own_nodes in ranks:
        assert usage == ranks[0][0]
        for name, held in own_nodes.items():
            nodes.setdefault(name, set()).update(held)
    nonfinite = {"tree/nonfinite_inputs": 2 * sum(range(1, world_size + 1))}
    expected = by_hand([leaves for _, leaves, _ in ranks], nodes, expert_parallel_size)
    assert ranks[0][0] == pytest.approx(expected | nonfinite)


def test_usage_of_a_forest_is_the_mean_over_its_trees() -> None:
    alone = [random_tree(4, storage="lazy", seed=tree).train() for tree in range(3)]
    forest = random_tree(4, sizes=(5, 12), storage="lazy", num_trees=3)
    assert forest.gate is not None
    gates = [tree.gate for tree in alone if tree.gate is not None]
    with torch.no_grad():
        forest.gate.weight.copy_(torch.cat([gate.weight for gate in gates]))
        forest.gate.running_mean.copy_(torch.cat([gate.running_mean for gate in gates]))
    usages = []
    for layers in ([forest], alone):
        for layer in layers:
            layer.records_loads = True
            layer(tokens(40)).sum().backward()
        usages.append(tree_usage(nn.ModuleList(layers), Collective(), Collective()))
    assert usages[0] == pytest.approx(usages[1]) and usages[0]["tree/dead_leaves"] > 0
