"""Growth of lazy tables: who is admitted, when and in which order; the same on any number of ranks, and after a resume."""

import copy
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distcond.nn import TreeLinear
from distcond.optim import RowAdam
from distcond.optim.sharded import ShardedRows
from distcond.train.table_files import load_tables, write_tables
from tests.helpers import run_ranks
from tests.thread_ranks import Groups
from tests.trees import path, seed_cpu, token_by_token, tokens

DEPTH, BATCH = 5, 12
LIMITS: list[dict[str, Any]] = [
    {"min_visits": 1, "max_nodes": 45},
    {"min_visits": 4},
    {"min_visits": 3, "max_nodes": 11},
    {"min_visits": 2, "max_nodes": 1000},
]
SHAPES: list[dict[str, Any]] = [{}, {"full_depth": 1, "rank": 2}, {"gate_gradient": "magnitude", "full_depth": 2, "rank": 1}]

# Every two of limits and shapes that differ in kind meet.
CASES = [(LIMITS[0], SHAPES[0]), (LIMITS[0], SHAPES[1]), (LIMITS[1], SHAPES[1]), (LIMITS[2], SHAPES[0]), (LIMITS[2], SHAPES[2])]


def make(seed: int = 0, **options: Any) -> TreeLinear:
    seed_cpu(seed)
    return TreeLinear(5, 4, **({"depth": DEPTH, "storage": "lazy"} | options)).double()


def keys_of(layer: TreeLinear) -> set[int]:
    assert layer.table is not None
    return {key for _, store in layer.table.stores() for key in store.keys.tolist()}


def train(layer: TreeLinear, steps: int, batch: int = BATCH) -> list[set[int]]:
    """The nodes that exist after each step."""
    optimizer, nodes = RowAdam(layer, lr=0.05), []
    for step in range(steps):
        (layer(tokens(batch, seed=step)) - 1.0).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        nodes.append(keys_of(layer))
    return nodes


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limits", "shape"), CASES)
def test_no_node_exists_without_its_parent_and_the_cap_is_kept_exactly(limits: dict[str, Any], shape: dict[str, Any]) -> None:
    layer = make(**limits, **shape)
    sizes = []
    for nodes in train(layer, 10):
        assert all((node - 1) // 2 in nodes for node in nodes if node)
        sizes.append(len(nodes))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    if limits.get("max_nodes", 1000) < 1000:
        assert sizes[-1] == limits["max_nodes"]


@pytest.mark.parametrize(("limits", "shape"), CASES)
def test_unseen_leaf_equals_its_deepest_existing_prefix(limits: dict[str, Any], shape: dict[str, Any]) -> None:
    layer, x = make(**limits, **shape), tokens(50, seed=9)
    train(layer, 4)
    assert 1 < layer.num_materialized < 2 ** (DEPTH + 1) - 1
    for mode in (True, False):
        if shape.get("gate_gradient") != "magnitude":
            torch.testing.assert_close(layer.train(mode)(x), token_by_token(layer, x), rtol=0, atol=1e-12)
    nodes = keys_of(layer)
    for leaf in layer.leaf(x)[:, 0].tolist():
        prefix = [layer._node(node) for node in path(leaf, DEPTH) if node in nodes]
        torch.testing.assert_close(layer.effective_weight(leaf)[0], torch.stack([w for w, _ in prefix]).sum(0))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_a_cap_that_is_never_reached_changes_no_bit(shape: dict[str, Any]) -> None:
    free, capped = make(**shape), make(max_nodes=2 ** (DEPTH + 1) - 1, **shape)
    assert train(free, 6) == train(capped, 6)
    x = tokens(50, seed=9)
    assert torch.equal(free(x), capped(x))


@pytest.mark.parametrize(("limits", "shape"), CASES)
def test_gradients_are_those_of_the_nodes_that_exist(limits: dict[str, Any], shape: dict[str, Any]) -> None:
    """As of a layer that does not grow: what the limits cut from the computation are zeros."""
    limited = make(**limits, **shape)
    train(limited, 4)
    free = make(**shape)
    free.load_state_dict({k: v for k, v in limited.state_dict().items() if k in free.state_dict()})
    results = []
    for layer in (limited, free):
        layer.zero_grad()
        x = tokens(BATCH, seed=9).requires_grad_()
        layer(x).square().sum().backward()
        assert layer.table is not None and layer.gate is not None
        grads = {}
        for _, store in layer.table.stores():
            rows, grad = store.take_gradient()
            grads |= {key: row for key, row in zip(store.keys[rows].tolist(), grad, strict=True) if key in keys_of(limited)}
        results.append((x.grad, layer.gate.weight.grad, grads))
    limited_nodes, free_nodes = (result[2] for result in results)
    settled = [key for key in limited_nodes if key in free_nodes]
    assert len(settled) > 3 and limited_nodes.keys() == free_nodes.keys()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-11)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-11)
    for key in settled:
        torch.testing.assert_close(limited_nodes[key], free_nodes[key], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("tokens_a_step", "min_visits", "steps_a_level"), [(1, 3, 3), (2, 3, 2), (3, 3, 1), (4, 3, 1)])
def test_levels_come_one_at_a_time_each_after_min_visits(tokens_a_step: int, min_visits: int, steps_a_level: int) -> None:
    """One path, asked for again and again; what is over when a level comes does not count for the next one."""
    layer = make(min_visits=min_visits, gate_gradient="none").eval()  # frozen thresholds: always the same path
    optimizer, x = RowAdam(layer, lr=0.05), tokens(1).expand(tokens_a_step, -1)
    for step in range(1, 20):
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert layer.num_materialized == 1 + min(DEPTH, step // steps_a_level)
    assert layer.table is not None and not len(layer.table.growth.visits.keys_G)


def test_with_min_visits_1_a_new_node_takes_the_gradient_it_came_with_and_else_that_of_its_next_visit() -> None:
    x = tokens(1)
    for min_visits, moves in ((1, True), (2, False)):
        layer = make(min_visits=min_visits).eval()
        optimizer = RowAdam(layer, lr=0.05)
        for _ in range(2 if min_visits == 2 else 1):
            layer(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        child = path(int(layer.leaf(x)), DEPTH)[1]
        assert child in keys_of(layer) and bool(layer.node_weight(child).any()) == moves


def test_visits_of_micro_batches_count_together_and_those_of_a_forgotten_step_do_not() -> None:
    layer = make(min_visits=4).eval()
    optimizer, x = RowAdam(layer, lr=0.05), tokens(1)

    def step(micro_batches: int, *, is_applied: bool = True) -> int:
        for _ in range(micro_batches):
            layer(x).sum().backward()
        if is_applied:
            optimizer.step()
        optimizer.zero_grad()
        return layer.num_materialized

    assert [step(3), step(9, is_applied=False), step(1), step(2), step(2)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("limits", [{}, {"max_nodes": 20}])
def test_nodes_of_a_step_that_is_not_applied_are_gone_even_between_forward_and_backward(limits: dict[str, Any]) -> None:
    layers = [make(**limits, full_depth=1, rank=2) for _ in range(2)]
    for layer, is_disturbed in zip(layers, (False, True), strict=True):
        optimizer = RowAdam(layer, lr=0.05)
        if is_disturbed:
            layer(tokens(BATCH, seed=50)).sum().backward()
        y = layer(tokens(BATCH, seed=50))
        assert layer.num_materialized > 1 or not is_disturbed
        optimizer.zero_grad()
        assert layer.num_materialized == 1
        assert layer.gate is not None
        layer.gate.take_statistics()
        y.square().sum().backward()
        optimizer.step()
        train(layer, 3)
    assert keys_of(layers[0]) == keys_of(layers[1])
    assert torch.equal(layers[0](tokens(50)), layers[1](tokens(50)))


# ---- any number of ranks ---------------------------------------------------------------------------------------------

STEPS = 6
PLACEMENTS: list[tuple[list[int], int]] = [*(([3, 0, 4, 5], expert) for expert in (1, 2, 4, 4)), ([7, 5], 2), ([12, 0], 1)]


def step_on_ranks(rank: int, groups: Groups, layer: TreeLinear, rows: ShardedRows, counts: list[int], step: int) -> None:
    """Two micro-batches; the third step is not applied."""
    for micro in range(2):
        x = tokens(BATCH, seed=2 * step + micro)[sum(counts[:rank]) : sum(counts[: rank + 1])]
        (groups.size * (layer(x) - 1.0).square().sum() / BATCH).backward()
    norm = rows.reduce_gradients()
    if step == 2:
        rows.discard()
    else:
        rows.step(lr=0.05, scale=min(1.0, 1.0 / float(norm) ** 0.5))
    if layer.gate is not None:
        layer.gate.weight.grad = None


def grow(
    layer: TreeLinear, counts: list[int], expert: int, steps: range, load: Path | None = None, save: Path | None = None
) -> tuple[list[set[int]], list[TreeLinear]]:
    """The nodes on all ranks together after each step, and each rank's layer."""
    groups = Groups(len(counts), expert)
    layers = [copy.deepcopy(layer) for _ in counts]

    def work(rank: int) -> list[set[int]]:
        mine, nodes = layers[rank], []
        rows = groups.shard(rank, mine, lr=0.05, weight_decay=0.1)
        if load is not None:
            rows.optimizer.log_decay = load_tables(load, mine, rank=rows.expert.rank, size=expert)
        for step in steps:
            step_on_ranks(rank, groups, mine, rows, counts, step)
            nodes.append(keys_of(mine))
        if save is not None:
            write_tables(save, mine, rows)
        return nodes

    return [set.union(*nodes) for nodes in zip(*groups.run(work), strict=True)], layers


@pytest.mark.parametrize(
    ("limits", "counts", "expert"), [(LIMITS[(2 * at) % 3], *placement) for at, placement in enumerate(PLACEMENTS)]
)
def test_the_same_nodes_exist_on_any_number_of_ranks(limits: dict[str, Any], counts: list[int], expert: int) -> None:
    layer, x = make(full_depth=2, rank=2, **limits), tokens(40, seed=9)
    alone, (first,) = grow(layer, [BATCH], 1, range(STEPS))
    ranks, layers = grow(layer, counts, expert, range(STEPS))
    assert ranks == alone
    assert alone[2] == alone[1] and alone[0] < alone[-1]
    # float64: sums over ranks in another order, 1e-16, through Adam's quotients.
    for mine in layers:
        assert mine.table is not None and first.table is not None
        assert mine.table.growth.num_nodes == len(alone[-1])
        for name, store in mine.table.stores():
            reference = dict(first.table.stores())[name]
            torch.testing.assert_close(store.data, reference.data[reference.find(store.keys)], rtol=0, atol=1e-10)
    assert torch.equal(first.leaf(x), layers[0].leaf(x))


@pytest.mark.parametrize("limits", [{}, *LIMITS[:2]])
def test_a_step_that_is_not_applied_makes_no_node_on_any_rank(limits: dict[str, Any]) -> None:
    before, at, after = grow(make(**limits), [7, 5], 2, range(1, 4))[0]
    assert before == at and before < after


@pytest.mark.parametrize("limits", [LIMITS[0], LIMITS[2]])
@pytest.mark.thorough
def test_a_resume_in_the_middle_of_counting_is_the_uninterrupted_run(limits: dict[str, Any], tmp_path: Path) -> None:
    counts, expert = [3, 0, 4, 5], 2
    layer = make(full_depth=2, rank=2, **limits)
    whole, straight = grow(layer, counts, expert, range(STEPS))
    _, half = grow(layer, counts, expert, range(3), save=tmp_path)
    fresh = make(full_depth=2, rank=2, **limits)
    assert fresh.gate is not None and half[0].gate is not None
    fresh.gate.load_state_dict(half[0].gate.state_dict())
    nodes, resumed = grow(fresh, counts, expert, range(3, STEPS), load=tmp_path)
    assert nodes == whole[3:]
    for one, other in zip(straight, resumed, strict=True):
        assert one.table is not None and other.table is not None
        for name, store in one.table.stores():
            again = dict(other.table.stores())[name]
            for part, values in {"data": store.data, **store.state}.items():
                assert torch.equal(values, {"data": again.data, **again.state}[part][again.find(store.keys)]), part
    for others, size in (([BATCH], 1), ([3, 3, 3, 3], 4)):
        assert grow(fresh, others, size, range(3, STEPS), load=tmp_path)[0] == whole[3:]


@pytest.mark.parametrize("limits", [LIMITS[0], LIMITS[2]])
def test_what_is_counted_travels_in_state_dicts_and_copies(limits: dict[str, Any]) -> None:
    layer, other = make(**limits), make(seed=1, **limits)
    train(layer, 3), train(other, 7)
    other.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    nodes = [train(module, 6) for module in (layer, other, twin)]
    assert nodes[0] == nodes[1] == nodes[2]


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident(steps: int, tokens_a_step: int, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes by which this process has grown, with a table that was trained, and the numbers in its rows."""
    seed_cpu(0)
    process = psutil.Process()
    warm = TreeLinear(64, 64, 8, storage="lazy", gate="hash")
    warm(torch.randn(8, 64)).sum().backward()
    before = process.memory_info().rss
    layer = TreeLinear(64, 64, storage="lazy", gate="hash", **options)
    optimizer = RowAdam(layer)
    for _ in range(steps):
        layer(torch.randn(tokens_a_step, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.table is not None
    numbers = sum(store.data.numel() for _, store in layer.table.stores())
    return process.memory_info().rss - before, numbers


@pytest.mark.parametrize(
    ("options", "steps", "tokens_a_step"),
    [({"depth": 40, "max_nodes": 900}, 5, 8), ({"depth": 40, "full_depth": 6, "rank": 2}, 50, 8)],
)
def test_a_table_takes_little_more_memory_than_its_rows_and_moments(
    options: dict[str, Any], steps: int, tokens_a_step: int
) -> None:
    """Weight and two moments of 4 bytes, 45 MB here; beside them keys, and one step's gradients."""
    ((taken, numbers),) = run_ranks(resident, 0, steps, tokens_a_step, options)
    assert numbers > 3e6
    assert taken < 1.3 * 12 * numbers


def test_what_cannot_come_to_exist_is_neither_computed_nor_given_a_gradient() -> None:
    """4,096 paths of 40 matrices of 64 x 64 would be 2.7 GB; one root and its visits are less than a hundredth."""
    ((taken, _),) = run_ranks(resident, 0, 2, 4096, {"depth": 40, "min_visits": 10**6})
    assert taken < 2.7e7
