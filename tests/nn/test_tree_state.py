"""TreeLinear as a module: state dict, copies, pickles, precision; a lazy table goes wherever its layer goes."""

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distcond.nn import TreeLinear
from distcond.optim import RowAdam
from tests.trees import seed_cpu, tokens

LAZY: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"full_depth": 1, "rank": 2},
    {"gate": "hash"},
    {"depth": 0},
    {"full_depth": 1, "rank": 2, "num_trees": 2},
]


def make(seed: int = 0, **options: Any) -> TreeLinear:
    seed_cpu(seed)
    return TreeLinear(5, 4, **({"depth": 4, "storage": "lazy"} | options))


def train(layer: nn.Module, steps: int = 3, seed: int = 0) -> None:
    optimizer = RowAdam(layer, lr=0.1)
    for step in range(steps):
        layer(tokens(6, seed=seed + step).float()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_layer(one: TreeLinear, other: TreeLinear) -> None:
    """The same function, before and after the same further training."""
    x = tokens(50, seed=77).float()
    assert torch.equal(one.leaf(x), other.leaf(x))
    assert torch.equal(one.eval()(x), other.eval()(x))
    assert one.num_materialized == other.num_materialized
    for layer in (one, other):
        if layer.table is not None:
            for _, store in layer.table.stores():
                store.replace(store.keys, store.data)  # what an optimiser left at the rows is not the layer's state
        train(layer.train(), seed=50)
    assert torch.equal(one.eval()(x), other.eval()(x))


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_gradients_of_rows_are_made_where_the_layer_is(storage: str) -> None:
    layer = make(storage=storage, full_depth=1, rank=2).to("meta")
    assert layer.seed.device.type == "meta"
    nodes = [torch.arange(2**level - 1, 2 ** (level + 1) - 1) for level in range(5)]
    assert [part.device.type for part in layer.layout.new_gradient(nodes)] == ["meta", "meta"]


@pytest.mark.parametrize("options", LAZY)
def test_state_dict_carries_the_rows_to_a_layer_that_had_others(options: dict[str, Any]) -> None:
    layer, other = make(**options), make(seed=1, **options)
    train(layer), train(other, seed=20)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    result = other.load_state_dict(torch.load(buffer, weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_layer(layer, other)


def test_state_dict_of_a_model_prefixes_the_rows_of_each_layer() -> None:
    model, other = nn.Sequential(make(), make(seed=1)), nn.Sequential(make(seed=2), make(seed=3))
    for layer in model:
        train(layer)
    assert "1.table.full.rows" in model.state_dict()
    other.load_state_dict(model.state_dict())
    for one, same in zip(model, other, strict=True):
        assert_same_layer(one, same)


def test_loading_a_layers_own_state_changes_nothing_of_its_training() -> None:
    """As with torch's optimisers: moments, clocks and the decay still to come belong to the rows."""
    runs = []
    for reload in (False, True):
        layer = make(full_depth=1, rank=2)
        optimizer = RowAdam(layer, lr=0.1, weight_decay=0.5)
        for step in range(4):
            if reload and step == 2:
                layer.load_state_dict(copy.deepcopy(layer.state_dict()))
            layer(tokens(6, seed=step).float()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(layer.eval()(tokens(50).float()))
    assert torch.equal(*runs)


@pytest.mark.parametrize("name", ["table.full.rows", "table.low.keys", "gate.running_mean", "seed"])
def test_a_missing_entry_is_refused_by_name_unless_asked_for(name: str) -> None:
    layer = make(full_depth=1, rank=2)
    train(layer)
    state = layer.state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        make(full_depth=1, rank=2).load_state_dict(state)
    make(full_depth=1, rank=2).load_state_dict(state, strict=False)


def test_an_entry_that_is_not_the_layers_is_refused_by_name() -> None:
    layer = make(full_depth=1, rank=2)
    state = layer.state_dict() | {"table.middle.rows": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"table\.middle\.rows"):
        layer.load_state_dict(state)


MISMATCHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"depth": 5}),
    ({}, {"bias": False}),
    ({"full_depth": 1, "rank": 2}, {"full_depth": 1, "rank": 3}),
    ({"full_depth": 1, "rank": 2}, {"full_depth": 2, "rank": 2}),
    ({"full_depth": 2, "rank": 2}, {"full_depth": 1, "rank": 2}),
    ({"full_depth": 1, "rank": 2}, {}),
    ({}, {"full_depth": 1, "rank": 2}),
    ({}, {"storage": "dense"}),
    ({"storage": "dense"}, {}),
    ({}, {"num_trees": 2}),
    ({"storage": "dense", "num_trees": 2}, {"storage": "dense"}),
]


@pytest.mark.parametrize(("saved", "given"), MISMATCHES)
def test_the_state_of_a_layer_of_another_shape_is_refused(saved: dict[str, Any], given: dict[str, Any]) -> None:
    layer = make(**saved)
    train(layer)
    with pytest.raises(RuntimeError, match="Error"):
        make(**given).load_state_dict(layer.state_dict())


def test_rows_that_do_not_match_their_keys_are_refused() -> None:
    layer = make()
    train(layer)
    state = layer.state_dict()
    state["table.full.rows"] = state["table.full.rows"][:-1]
    with pytest.raises(RuntimeError, match=r"table\.full"):
        make().load_state_dict(state)


@pytest.mark.parametrize("options", LAZY)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(way: str, options: dict[str, Any]) -> None:
    layer = make(**options)
    train(layer)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = tokens(50).float()
    before = layer.eval()(x)
    train(other.train(), seed=30)
    assert torch.equal(layer(x), before) and not torch.equal(other.eval()(x), before)
    assert_same_layer(layer, copy.deepcopy(layer))


def test_double_moves_the_rows_and_half_precision_does_not() -> None:
    layer = make(full_depth=1, rank=2)
    train(layer)
    assert layer.table is not None
    rows = [store.data.clone() for _, store in layer.table.stores()]
    for convert in (nn.Module.bfloat16, nn.Module.half, nn.Module.float, lambda module: module.to(torch.bfloat16)):
        convert(layer)
        for before, (_, store) in zip(rows, layer.table.stores(), strict=True):
            assert store.data.dtype == torch.float32 and torch.equal(store.data, before)
    assert layer.gate is not None and layer.gate.weight.dtype == torch.bfloat16
    layer.double()
    x = tokens(9)
    assert layer(x).dtype == torch.float64
    assert all(store.data.dtype == torch.float64 for _, store in layer.table.stores())
    assert layer.node_weight(0).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_a_layer_trains_in_another_precision(storage: str, dtype: torch.dtype) -> None:
    layer = make(storage=storage, full_depth=1, rank=2).to(dtype)
    optimizer = RowAdam(layer, lr=0.01)
    x, losses = tokens(40).to(dtype), []
    for _ in range(30):
        y = layer(x)
        assert y.dtype == dtype
        loss = (y.double() - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_a_layer_that_is_made_under_another_default_precision_is_one_of_it(
    storage: str, dtype: torch.dtype, default_dtype: None
) -> None:
    torch.set_default_dtype(dtype)
    layer = make(storage=storage, full_depth=1, rank=2)
    assert layer.gate is not None and layer.gate.running_mean.dtype == torch.promote_types(dtype, torch.float32)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    train(layer)
    x = tokens(9).to(dtype)
    y = layer.eval()(x)
    # 4 levels added in the precision asked for, of rows at best float32 where a table holds them; numbers of size 1.
    rounding = max(torch.finfo(kind).eps for kind in (dtype, dtype if storage == "dense" else torch.float32))
    torch.testing.assert_close(y, layer.double()(x.double()).to(dtype), rtol=0, atol=10 * rounding)


def test_a_table_stays_on_the_meta_device_with_its_layer() -> None:
    layer = make(full_depth=1, rank=2).to("meta")
    assert layer.table is not None
    for _, store in layer.table.stores():
        assert store.data.device.type == store.keys.device.type == "meta"


def test_printing_a_layer_shows_how_far_it_has_grown() -> None:
    layer = make()
    train(layer)
    assert f"materialized={layer.num_materialized}" in repr(layer) and "depth=4" in repr(layer)


@pytest.fixture
def lone_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("storage", ["lazy", "dense"])
def test_plain_ddp_around_a_layer_of_row_adam_is_refused_and_told_what_to_use(storage: str, lone_rank: Any) -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(5, 5), layer := make(storage=storage)))
    RowAdam(layer)
    with pytest.raises(RuntimeError, match=r"distcond\.initialize\(model=model, config=\.\.\.\)"):
        model(tokens(6).float())


def test_plain_ddp_trains_a_dense_layer(lone_rank: Any) -> None:
    layer = make(storage="dense")
    alone = copy.deepcopy(layer)
    model = DistributedDataParallel(layer)
    for module in (model, alone):
        module(tokens(6).float()).square().sum().backward()
    for one, other in zip(layer.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
