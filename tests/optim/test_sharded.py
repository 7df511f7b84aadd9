"""ShardedRows among ranks in threads: any number of ranks trains the table that one rank would."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcond.nn import TreeLinear
from tests.thread_ranks import Groups
from tests.trees import path, random_tree, seed_cpu, tokens

STEPS, BATCH, DEPTH, OUT = 3, 12, 4, 6
# float64: sums over ranks in another order, 1e-16, through Adam's quotients and three steps.
CLOSE = {"rtol": 0, "atol": 1e-11}
SHAPES: list[dict[str, Any]] = [
    {"full_depth": 1, "rank": 2},
    {"bias": False, "gate": "hash"},
    {"full_depth": 2, "rank": 1, "gate_gradient": "magnitude"},
    {"full_depth": 1, "rank": 2, "num_trees": 3},
    {"num_trees": 2, "bias": False, "gate_gradient": "magnitude"},
    {"num_trees": 2, "full_depth": 1, "rank": 1, "gate_gradient": "flip"},
]
PLACEMENTS: list[tuple[list[int], int, int | None]] = [
    ([5, 7], 2, None),  # tokens per rank, expert-parallel size, shard level
    ([12, 0], 2, None),
    ([0, 12, 0], 3, 2),
    ([3, 3, 3, 3], 2, 1),
    ([0, 5, 7, 0], 4, 2),
    ([4, 0, 3, 5], 1, None),  # four replicas
    ([6, 6], 1, None),  # replicas alone
    ([6, 6], 2, 0),  # a level without a subtree for every rank: replicated
]


def train(rank: int, groups: Groups, layer: TreeLinear, counts: list[int], shard_level: int | None) -> dict[str, Any]:
    """Three clipped steps of two micro-batches on this rank's part of each batch; what the rank saw and holds."""
    rows = groups.shard(rank, layer, shard_level, lr=0.05, weight_decay=0.1)
    norms, outputs, gates = [], [], []
    for step in range(STEPS):
        for micro in range(2):
            x, target = tokens(BATCH, seed=2 * step + micro), tokens(BATCH, OUT, seed=100 + 2 * step + micro)
            mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            y = layer(x[mine])
            # Ranks divide by the size of the whole batch; the rows then take the mean over ranks.
            (groups.size * (y - target[mine]).square().sum() / BATCH).backward()
            outputs.append(y.detach())
        norm = rows.reduce_gradients()
        rows.step(lr=0.05, scale=min(1.0, 1.0 / float(norm) ** 0.5))
        norms.append(float(norm))
        if layer.gate is not None and layer.gate.weight.grad is not None:
            gates.append(rows.world.sum_(layer.gate.weight.grad) / groups.size)
            layer.gate.weight.grad = None
    assert layer.table is not None and layer.gate is not None
    held = {
        (name, key): (store.data[row], int(store.state["clock"][row]) if "clock" in store.state else 0)
        for name, store in layer.table.stores()
        for row, key in enumerate(store.keys.tolist())
    }
    return {"norms": norms, "outputs": outputs, "gates": gates, "mean": layer.gate.running_mean, "held": held, "layer": layer}


def make(shape: int) -> TreeLinear:
    seed_cpu(0)
    return TreeLinear(5, OUT, DEPTH, storage="lazy", **SHAPES[shape]).double()


@cache
def train_alone(shape: int) -> dict[str, Any]:
    groups, layer = Groups(1, 1), make(shape)
    return groups.run(lambda rank: train(rank, groups, layer, [BATCH], None))[0]


# Every placement with three shapes, every shape with four placements.
PAIRS = [(shape, place) for shape in range(len(SHAPES)) for place in range(len(PLACEMENTS)) if (shape + place) % 2]


@pytest.mark.parametrize(("options", "counts", "expert", "shard_level"), [(SHAPES[s], *PLACEMENTS[p]) for s, p in PAIRS])
def test_any_number_of_ranks_trains_the_table_that_one_rank_would(
    counts: list[int], expert: int, shard_level: int | None, options: dict[str, Any]
) -> None:
    alone, layer = train_alone(SHAPES.index(options)), make(SHAPES.index(options))
    groups = Groups(len(counts), expert)
    copies = [copy.deepcopy(layer) for _ in counts]
    ranks = groups.run(lambda rank: train(rank, groups, copies[rank], counts, shard_level))
    assert max(alone["norms"]) > 1.0  # clipping took place
    for result in ranks:
        torch.testing.assert_close(torch.tensor(result["norms"]), torch.tensor(alone["norms"]), rtol=1e-5, atol=0)
        torch.testing.assert_close(result["gates"], alone["gates"], **CLOSE)
        torch.testing.assert_close(result["mean"], alone["mean"], **CLOSE)
    for step, whole in enumerate(alone["outputs"]):
        torch.testing.assert_close(torch.cat([result["outputs"][step] for result in ranks]), whole, **CLOSE)
    union = {key for result in ranks for key in result["held"]}
    assert union == alone["held"].keys()
    for rank, result in enumerate(ranks):
        for (name, key), (row, clock) in result["held"].items():
            torch.testing.assert_close(row, alone["held"][name, key][0], **CLOSE)
            assert clock == alone["held"][name, key][1]
            owner = int(result["layer"].plan.node_owner(torch.tensor([key])))
            assert owner in (-1, rank % expert)
    homes: dict[Any, int] = {}
    for result in ranks[:expert]:  # one copy of the table: replicated nodes on every rank, the others on one
        for name, key in result["held"]:
            homes[name, key] = homes.get((name, key), 0) + 1
    plan = ranks[0]["layer"].plan
    for (_, key), count in homes.items():
        assert count == (expert if int(plan.node_owner(torch.tensor([key]))) < 0 else 1)


@pytest.mark.parametrize("counts", [[3, 0], [0, 0], [1, 5]])
def test_a_sharded_layer_computes_its_function_without_training(counts: list[int]) -> None:
    layer = random_tree(DEPTH, storage="lazy", full_depth=2, rank=2)
    x = tokens(sum(counts))
    expected = layer(x).detach()
    groups, copies = Groups(2, 2), [copy.deepcopy(layer), copy.deepcopy(layer)]

    def work(rank: int) -> Tensor:
        groups.shard(rank, copies[rank])
        with torch.no_grad():
            return copies[rank].eval()(x.split(counts)[rank])

    outputs = groups.run(work)
    assert [len(y) for y in outputs] == counts
    torch.testing.assert_close(torch.cat(outputs), expected, **CLOSE)
    assert copies[0].num_materialized + copies[1].num_materialized < 2 * layer.num_materialized


def test_every_rank_starts_from_the_rows_and_buffers_of_rank_0() -> None:
    layers = [random_tree(3, storage="lazy", seed=seed) for seed in range(3)]
    first = copy.deepcopy(layers[0])
    groups = Groups(3, 3)
    groups.run(lambda rank: groups.shard(rank, layers[rank], shard_level=2) and None)
    for layer in layers:
        assert torch.equal(layer.node_weight(0), first.node_weight(0)) and int(layer.seed) == int(first.seed)
        assert torch.equal(layer.gate.running_mean, first.gate.running_mean)
        leaves = [leaf for leaf in range(8) if int(layer.plan.owner(torch.tensor([leaf]))) == layer.collective.rank]
        assert leaves
        for node in {node for leaf in leaves for node in path(leaf, 3)}:
            assert torch.equal(layer.node_weight(node), first.node_weight(node))


def test_a_sharded_layer_loads_its_part_of_a_whole_table() -> None:
    whole = random_tree(DEPTH, storage="lazy", full_depth=2, rank=2)
    layers = [random_tree(DEPTH, storage="lazy", full_depth=2, rank=2, seed=5) for _ in range(2)]
    groups = Groups(2, 2)

    def work(rank: int) -> tuple[int, int]:
        groups.shard(rank, layers[rank])
        before = layers[rank].num_materialized
        layers[rank].load_state_dict(whole.state_dict())
        return before, layers[rank].num_materialized

    for before, after in groups.run(work):
        assert before == after < whole.num_materialized
    for layer in layers:
        assert torch.equal(layer.node_weight(0), whole.node_weight(0))


def test_tables_of_different_sizes_are_refused_with_both_numbers() -> None:
    seed_cpu(0)
    layers = [random_tree(3, storage="lazy"), TreeLinear(5, 4, 3, storage="lazy").double()]
    groups = Groups(2, 2)
    with pytest.raises(ValueError, match="1 to 15 full nodes"):
        groups.run(lambda rank: groups.shard(rank, layers[rank]))


def test_scaling_the_step_is_scaling_the_loss() -> None:
    """What clipping does; eps = 1 makes Adam feel the size of a gradient."""
    results = []
    for loss_scale, step_scale in ((0.5, 1.0), (1.0, 0.5)):  # halves are exact
        layer = random_tree(3, storage="lazy")
        groups = Groups(1, 1)

        def work(
            rank: int, layer: TreeLinear = layer, groups: Groups = groups, scales: tuple[float, float] = (loss_scale, step_scale)
        ) -> None:
            rows = groups.shard(rank, layer, lr=0.1, eps=1.0)
            for step in range(3):
                (scales[0] * layer(tokens(BATCH, seed=step))).sum().backward()
                rows.reduce_gradients()
                rows.step(lr=0.1, scale=scales[1])

        groups.run(work)
        results.append(layer(tokens(BATCH)))
    assert torch.equal(*results)


def test_a_step_that_is_not_applied_leaves_no_trace() -> None:
    results = []
    for broken in (False, True):
        layer = random_tree(3, storage="lazy")
        groups = Groups(1, 1)

        def work(rank: int, layer: TreeLinear = layer, broken: bool = broken, groups: Groups = groups) -> None:
            rows = groups.shard(rank, layer, lr=0.1, weight_decay=0.1)
            for step in range(3):
                if broken and step == 1:
                    layer(tokens(BATCH, seed=50)).square().sum().backward()
                    rows.reduce_gradients()
                    rows.discard()
                layer(tokens(BATCH, seed=step)).square().sum().backward()
                rows.reduce_gradients()
                rows.step(lr=0.1, scale=1.0)

        groups.run(work)
        results.append((layer(tokens(BATCH)), layer.gate.running_mean))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_dense_layers_beside_the_tables_gather_nothing_from_step_to_step() -> None:
    """Their nodes are trained by another optimiser, so nobody would ever ask which ones were touched."""
    seed_cpu(0)
    model = nn.Sequential(TreeLinear(5, 5, 2, storage="lazy"), TreeLinear(5, 4, 2, storage="dense"))
    groups = Groups(1, 1)

    def work(rank: int) -> int:
        rows = groups.shard(rank, model)
        for step in range(3):
            model(tokens(BATCH, seed=step).float()).sum().backward()
            rows.reduce_gradients()
            rows.step(lr=0.1, scale=1.0)
        return len(model[1].take_touched())

    assert groups.run(work) == [0]
