"""Rebalancing: subtrees move to other ranks with all that belongs to them, and nothing else changes."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distcond.nn import TreeLinear
from distcond.train.table_files import load_tables, write_tables
from tests.thread_ranks import Groups
from tests.trees import seed_cpu, tokens

DEPTH, BATCH, STEPS = 6, 24, 8
LIMITS = {"min_visits": 5, "max_nodes": 40}
PLACEMENTS: list[tuple[list[int], int, dict[str, int]]] = [
    ([11, 13], 2, {}),
    ([5, 0, 12, 7], 2, LIMITS),
    ([5, 0, 12, 7], 4, {"num_trees": 2}),
    ([5, 0, 12, 7], 4, LIMITS),
]
# float64: sums over ranks in another order, 1e-16, through Adam's quotients.
CLOSE = {"rtol": 0, "atol": 1e-10}


def make(**options: Any) -> TreeLinear:
    seed_cpu(0)
    return TreeLinear(5, 4, DEPTH, storage="lazy", full_depth=3, rank=2, **options).double()


def skewed(step: int) -> Tensor:
    """Tokens around one point: few subtrees take most of them."""
    return 0.8 * tokens(BATCH, seed=step) + tokens(1, seed=3)


def train(
    layer: TreeLinear,
    counts: list[int],
    expert: int,
    steps: range,
    *,
    every: int | None = None,
    load: Path | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """Outputs and nodes of all ranks together, and what each rank served at each step."""
    groups = Groups(len(counts), expert)
    layers = [copy.deepcopy(layer) for _ in counts]

    def work(rank: int) -> tuple[list[Tensor], list[int], list[tuple[int, ...]]]:
        mine, outputs, served, plans = layers[rank], [], [], []
        mine.eval()  # thresholds stay where they are, so that the skew stays
        mine.records_loads = True
        rows = groups.shard(rank, mine, lr=0.05, weight_decay=0.1, rebalance_every=every)
        if load is not None:
            rows.optimizer.log_decay = load_tables(load, mine, rank=rows.expert.rank, size=expert)
        for step in steps:
            y = mine(skewed(step)[sum(counts[:rank]) : sum(counts[: rank + 1])])
            (groups.size * (y - 1.0).square().sum() / BATCH).backward()
            rows.reduce_gradients()
            rows.step(lr=0.05, scale=1.0)
            outputs.append(y.detach())
            served.append(int(mine.take_leaf_loads().count_G.sum()))
            plans.append(mine.plan.owner_S)
        if save is not None:
            write_tables(save, mine, rows)
        return outputs, served, plans

    results = groups.run(work)
    outputs = [torch.cat(parts) for parts in zip(*(result[0] for result in results), strict=True)]
    assert all(result[2] == results[0][2] for result in results)
    return {"outputs": outputs, "served": [result[1] for result in results], "plans": results[0][2], "layers": layers}


def rows_of(layer: TreeLinear) -> dict[tuple[str, int], dict[str, Tensor]]:
    assert layer.table is not None
    return {
        (kind, key): {"rows": store.data[row], **{name: value[row] for name, value in store.state.items()}}
        for kind, store in layer.table.stores()
        for row, key in enumerate(store.keys.tolist())
    }


@cache
def rows_of_one_rank(limits: str) -> dict[tuple[str, int], dict[str, Tensor]]:
    (alone,) = train(make(**json.loads(limits)), [BATCH], 1, range(5))["layers"]
    return rows_of(alone)


@pytest.mark.parametrize(("counts", "expert", "limits"), PLACEMENTS)
def test_a_run_that_rebalances_is_the_run_that_does_not(counts: list[int], expert: int, limits: dict[str, Any]) -> None:
    still, moving = (train(make(**limits), counts, expert, range(5), every=every) for every in (None, 2))
    assert len(set(still["plans"])) == 1 and len(set(moving["plans"])) > 1
    torch.testing.assert_close(moving["outputs"], still["outputs"], **CLOSE)
    whole, seen = rows_of_one_rank(json.dumps(limits)), set()
    for rank, layer in enumerate(moving["layers"]):
        for (kind, key), values in rows_of(layer).items():
            torch.testing.assert_close(values, whole[kind, key], **CLOSE)
            assert int(layer.plan.node_owner(torch.tensor([key]))) in (-1, rank % expert)
            seen.add((kind, key))
    assert seen == whole.keys()


def test_busiest_rank_serves_less_of_skewed_data_once_the_map_was_made_from_visits() -> None:
    result = train(make(), [6, 6, 6, 6], 4, range(STEPS), every=4)
    served = torch.tensor(result["served"], dtype=torch.float64)  # [rank, step]
    before, after = (float(part.sum(1).max() / part.sum(1).mean()) for part in served.split(STEPS // 2, dim=1))
    assert before > 1.9 and after < 0.8 * before, (before, after)  # seen: 2.04 and 1.50


RESUMED: tuple[list[int], int, dict[str, Any]] = ([5, 0, 12, 7], 2, {"min_visits": 3})


@cache
def uninterrupted() -> dict[str, Any]:
    counts, expert, limits = RESUMED
    return train(make(**limits), counts, expert, range(STEPS), every=2)


@pytest.mark.parametrize("stop", [4, 5])
@pytest.mark.thorough
def test_a_resume_between_rebalancings_is_the_uninterrupted_run(stop: int, tmp_path: Path) -> None:
    counts, expert, limits = RESUMED
    straight = uninterrupted()
    train(make(**limits), counts, expert, range(stop), every=2, save=tmp_path)
    resumed = train(make(**limits), counts, expert, range(stop, STEPS), every=2, load=tmp_path)
    assert len(set(straight["plans"][stop - 1 :])) > 1
    assert resumed["plans"] == straight["plans"][stop:]
    assert all(torch.equal(*pair) for pair in zip(resumed["outputs"], straight["outputs"][stop:], strict=True))
    for one, other in zip(straight["layers"], resumed["layers"], strict=True):
        mine, theirs = rows_of(one), rows_of(other)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[node][name]) for node, values in mine.items() for name, value in values.items())
    for others, size in (([BATCH], 1), ([6, 6, 6, 6], 4)):
        moved = train(make(**limits), others, size, range(stop, STEPS), every=2, load=tmp_path)
        torch.testing.assert_close(moved["outputs"], straight["outputs"][stop:], **CLOSE)
