"""RowAdam: torch's Adam on rows touched at every step; clocks, moments and decay per row on the others; both storages."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distcond.optim.row_adam as row_adam
from distcond.nn import TreeLinear
from distcond.optim import RowAdam
from distcond.table import RowStore
from tests.pairs import every_pair
from tests.trees import nodes_of, seed_cpu, tokens

OPTIONS: list[dict[str, Any]] = [{}, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2}, {"weight_decay": 0.3}, {"betas": (0.0, 0.99)}]
SHAPES: list[dict[str, Any]] = [{}, {"bias": False}, {"full_depth": 0, "rank": 2}, {"full_depth": 1, "rank": 1, "bias": False}]


def make_layer(depth: int = 3, seed: int = 0, **options: Any) -> TreeLinear:
    seed_cpu(seed)
    return TreeLinear(5, 4, depth, **options)


# ---- against torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "storage", "dtype"), every_pair(OPTIONS, ["dense", "lazy"], [torch.float32, torch.float64]))
def test_a_row_touched_at_every_step_has_torchs_adam(options: dict[str, Any], storage: str, dtype: torch.dtype) -> None:
    layer = make_layer(0, storage=storage).to(dtype)
    linear = nn.Linear(5, 4).to(dtype)
    with torch.no_grad():
        weight, bias = layer.effective_weight(0)
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    rows = RowAdam(layer, **options)
    adam = torch.optim.AdamW(linear.parameters(), **({"weight_decay": 0.0} | options))
    for step in range(30):
        for module, optimizer in ((layer, rows), (linear, adam)):
            module(tokens(7, seed=step).to(dtype)).sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    # Steps of at most lr x 30 = 3; Adam's quotient is known to a few roundings, 6e-8 in float32.
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-13}
    torch.testing.assert_close(layer.effective_weight(0), (linear.weight.detach(), linear.bias.detach()), **tolerance)


# ---- rows of their own -----------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row in plain Python."""

    value: list[float]
    first: list[float]
    second: list[float]
    clock: int = 0
    decays: float = 1.0

    def touch(self, grad: list[float], lr: float, betas: tuple[float, float], eps: float) -> None:
        self.clock += 1
        for i, g in enumerate(grad):
            self.first[i] = betas[0] * self.first[i] + (1 - betas[0]) * g
            self.second[i] = betas[1] * self.second[i] + (1 - betas[1]) * g * g
            mean, square = self.first[i] / (1 - betas[0] ** self.clock), self.second[i] / (1 - betas[1] ** self.clock)
            self.value[i] = self.value[i] * self.decays - lr * mean / (math.sqrt(square) + eps)
        self.decays = 1.0


@pytest.mark.parametrize("block", [1, 7, 10**6])
@pytest.mark.parametrize("options", OPTIONS)
def test_clocks_moments_and_decay_are_a_rows_own(options: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_adam, "BLOCK_NUMBERS", block)
    width, count, generator = 3, 6, torch.Generator().manual_seed(0)
    store = RowStore(width)
    store.append(torch.arange(count), torch.randn(count, width, generator=generator))
    store.move(torch.device("cpu"), torch.float64)
    optimizer = RowAdam(nn.Identity(), **options)
    rows = [Row(values, [0.0] * width, [0.0] * width) for values in store.data.tolist()]
    for step in range(25):
        optimizer.lr = 0.01 * (1 + step % 3)
        # Row 0 always, row 5 at the first and the last step only, the others at random.
        touched = torch.rand(count, generator=generator) < 0.4
        touched[0], touched[5] = True, step in (0, 24)
        places = touched.nonzero()[:, 0]
        grad = torch.randn(len(places), width, generator=generator, dtype=torch.float64)
        before = store.data.clone(), {name: value.clone() for name, value in store.state.items()}
        optimizer.step_rows([(store, places, grad)])
        for row in rows:
            row.decays *= 1 - optimizer.lr * optimizer.weight_decay
        for place, values in zip(places.tolist(), grad.tolist(), strict=True):
            rows[place].touch(values, optimizer.lr, optimizer.betas, optimizer.eps)
        assert torch.equal(store.data[~touched], before[0][~touched])
        for name, value in before[1].items():
            assert torch.equal(store.state[name][~touched], value[~touched])
        expected = torch.tensor([row.value for row in rows], dtype=torch.float64)
        torch.testing.assert_close(store.data, expected, rtol=1e-12, atol=1e-12)
    assert store.state["clock"].tolist() == [row.clock for row in rows]
    assert rows[5].clock == 2 and rows[0].clock == 25


def test_rows_on_other_devices_are_updated_together_however_wide() -> None:
    """Seen on the meta device, which has no numbers to ask for."""
    store, optimizer = RowStore(row_adam.WIDE_ROW, torch.device("meta")), RowAdam(nn.Module(), weight_decay=0.1)
    keys = torch.arange(5, device="meta")
    store.append(keys, torch.zeros(5, store.width, device="meta"))
    optimizer.step_rows([(store, keys[:3], store.data[:3].clone())])
    assert store.state["exp_avg"].device.type == "meta"


def test_missed_decay_is_the_repeated_decay() -> None:
    """A row untouched for 40 steps and then touched with no gradient at all has decayed 41 times."""
    store = RowStore(2)
    store.append(torch.arange(2), torch.ones(2, 2))
    store.move(torch.device("cpu"), torch.float64)
    optimizer, first = RowAdam(nn.Identity(), lr=0.1, weight_decay=0.5), torch.tensor([0])
    for _ in range(40):
        optimizer.step_rows([(store, first, torch.zeros(1, 2, dtype=torch.float64))])
    assert store.data[1].tolist() == [1.0, 1.0]
    optimizer.step_rows([(store, torch.tensor([0, 1]), torch.zeros(2, 2, dtype=torch.float64))])
    expected = torch.full((2, 2), 0.95**41, dtype=torch.float64)
    torch.testing.assert_close(store.data, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_a_row_routed_to_is_touched_even_by_a_gradient_of_zero(storage: str) -> None:
    layer = make_layer(3, storage=storage).double().eval()  # frozen thresholds: both steps take the same path
    optimizer = RowAdam(layer, lr=0.1)
    x = tokens(1)

    def step(scale: float) -> None:
        (layer(x) * scale).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(1.0)
    before = nodes_of(layer)[0]
    step(0.0)
    moved = (nodes_of(layer)[0] - before).abs().amax((1, 2)) > 0
    assert int(moved.sum()) == 4  # the path of the token moves on by its momentum, the rest stays
    # Adam at clock 2 with g = (g, 0): lr x (b1 / (1 + b1)) / sqrt(b2 / (1 + b2)) of the sign of g.
    expected = 0.1 * (0.9 / 1.9) / math.sqrt(0.999 / 1.999)
    changes = (nodes_of(layer)[0] - before).abs()
    torch.testing.assert_close(changes[moved], torch.full((4, 4, 5), expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_untouched_nodes_stay_as_they_are(storage: str) -> None:
    layer = make_layer(4, storage=storage, full_depth=2, rank=2)
    optimizer = RowAdam(layer, lr=0.1, weight_decay=0.5)
    for step in range(5):
        x = tokens(3, seed=step).float()
        before = nodes_of(layer)
        layer(x).square().sum().backward()
        touched = {2**level - 1 + (leaf >> (4 - level)) for leaf in layer.leaf(x).flatten().tolist() for level in range(5)}
        optimizer.step()
        optimizer.zero_grad()
        for was, now in zip(before, nodes_of(layer), strict=True):
            for node in range(31):
                assert torch.equal(was[node], now[node]) == (node not in touched)


# ---- both storages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "gate", "dtype", "weight_decay"),
    every_pair(
        [*SHAPES, {"full_depth": 1, "rank": 2, "num_trees": 2}, {"num_trees": 4}],
        ["linear", "hash"],
        [torch.float64, torch.float32],
        [0.3, 0.0],
    ),
)
def test_lazy_equals_dense_after_any_number_of_steps(
    options: dict[str, Any], gate: str, dtype: torch.dtype, weight_decay: float
) -> None:
    layers = [make_layer(4, storage=storage, gate=gate, **options) for storage in ("dense", "lazy")]
    dense, lazy = (layer.to(dtype) for layer in layers)
    assert int(dense.seed) == int(lazy.seed)
    optimizers = [RowAdam(layer, lr=0.05, weight_decay=weight_decay) for layer in (dense, lazy)]
    gates = [torch.optim.SGD([layer.gate.weight], lr=1e-3) if gate == "linear" else None for layer in (dense, lazy)]
    for step in range(6):
        outputs = []
        for layer, optimizer, gate_optimizer in zip((dense, lazy), optimizers, gates, strict=True):
            for part in tokens(9, seed=step).to(dtype).split([4, 0, 5]):
                y = layer(part)
                (y - 1.0).square().sum().backward()
            outputs.append(y)
            optimizer.step()
            optimizer.zero_grad()
            if gate_optimizer is not None:
                gate_optimizer.step()
                gate_optimizer.zero_grad()
        # Both sum micro-batches in their own order; Adam's quotients keep relative errors of 1e-7 (1e-16), over 6 steps.
        tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-11}
        torch.testing.assert_close(outputs[0], outputs[1], **tolerance)
    torch.testing.assert_close(nodes_of(dense), nodes_of(lazy), **tolerance)
    torch.testing.assert_close(dense.gate.running_mean, lazy.gate.running_mean, **tolerance)
    torch.testing.assert_close(dense.gate.weight, lazy.gate.weight, **tolerance)
    assert 9 < lazy.num_materialized < dense.num_materialized


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_a_new_optimiser_starts_afresh(storage: str) -> None:
    """Moments, clocks and decay belong to an optimiser, as with torch's, not to what it trained."""
    layer = make_layer(2, storage=storage, full_depth=1, rank=2)

    def train(module: TreeLinear) -> None:
        optimizer = RowAdam(module, lr=0.1, weight_decay=0.5)
        for step in range(3):
            module(tokens(6, seed=step).float()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(layer)
    stranger = make_layer(2, seed=1, storage=storage, full_depth=1, rank=2)
    stranger.load_state_dict(copy.deepcopy(layer.state_dict()))
    train(layer), train(stranger)
    torch.testing.assert_close(nodes_of(layer), nodes_of(stranger), rtol=0, atol=0)


@pytest.mark.parametrize("storage", ["dense", "lazy"])
def test_zero_grad_forgets_and_a_step_without_gradient_moves_nothing(storage: str) -> None:
    layer = make_layer(3, storage=storage)
    optimizer = RowAdam(layer, lr=0.1, weight_decay=0.5)
    layer(tokens(6).float()).sum().backward()
    optimizer.zero_grad()
    before = nodes_of(layer)
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(nodes_of(layer), before, rtol=0, atol=0)


def test_every_tree_of_a_model_is_trained_and_nothing_else() -> None:
    seed_cpu(0)
    model = nn.Sequential(TreeLinear(5, 6, 2, storage="lazy"), nn.Linear(6, 6), TreeLinear(6, 4, 2, storage="dense"))
    before = copy.deepcopy(model)
    optimizer = RowAdam(model, lr=0.1)
    model(tokens(20).float()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(nodes_of(model[0])[0][0], nodes_of(before[0])[0][0])
    assert not torch.equal(nodes_of(model[2])[0][0], nodes_of(before[2])[0][0])
    for name in ("1.weight", "1.bias", "0.gate.weight", "2.gate.weight"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))


def test_the_learning_rate_may_change_between_steps() -> None:
    layer = make_layer(0, storage="lazy")
    optimizer = RowAdam(layer, lr=0.1)
    x: Tensor = tokens(5).float()
    sizes = []
    for lr in (0.1, 0.0, 0.01):
        optimizer.lr = lr
        before = layer.node_weight(0).clone()
        layer(x).sum().backward()
        optimizer.step()
        sizes.append((layer.node_weight(0) - before).abs().max().item())
    assert sizes == pytest.approx([0.1, 0.0, 0.01], rel=1e-4)  # a constant gradient: steps of lr


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"lr": 0.1, "weight_decay": 10.0}])
def test_options_out_of_range_are_refused_naming_them(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*needed are"):
        RowAdam(TreeLinear(2, 2, 1), **options)
