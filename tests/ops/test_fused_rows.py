"""Paths, look-up and Adam by the kernels of GPUs: on a GPU as they are, elsewhere through Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from distcond.nn import TreeLinear
from distcond.ops import TreePath, fused_rows, leaf_index
from distcond.optim import RowAdam
from tests.ops.test_native import leaves_of
from tests.trees import random_tree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("depth", "trees"), [(0, 1), (3, 1), (20, 2), (60, 3)])
def test_a_leaf_is_its_bits(depth: int, trees: int) -> None:
    gates = torch.randn(7, trees, depth, generator=torch.Generator().manual_seed(0))
    wanted = (leaf_index(gates > 0) + (torch.arange(trees) << depth)).flatten()
    assert torch.equal(fused_rows.leaf_of(gates.to(DEVICE)).cpu(), wanted)


@pytest.mark.parametrize(  # many tokens once: they take a second each where kernels are interpreted
    ("depth", "trees", "number", "kind"),
    [(0, 1, 1, "one"), (4, 1, 13, "some"), (4, 1, 13, "own"), (62, 1, 3, "some"), (3, 3, 300, "some")],
)
def test_a_path_is_that_of_the_cpu(depth: int, trees: int, number: int, kind: str) -> None:
    leaf = leaves_of(kind, number, depth) + ((torch.arange(number) % trees) << depth)
    path, wanted = fused_rows.path_of(leaf.to(DEVICE), depth, trees), TreePath.of(leaf, depth, trees)
    assert torch.equal(path.order_T.cpu(), wanted.order_T) and torch.equal(path.place_T.cpu(), wanted.place_T)
    for got, want in zip(path.flat(), wanted.flat(), strict=True):
        got, want = (part if isinstance(part, torch.Tensor) else part.flat_N for part in (got, want))
        first = 0 if want is not wanted.flat().parents.flat_N else wanted.nodes.bounds[1]  # roots have no parent
        assert torch.equal(got.cpu()[first:], want[first:])
    assert path.number_LT is not None
    ids = path.nodes.flat_N[path.number_LT].cpu()
    for level, row in enumerate(ids):
        assert torch.equal(row, (leaf.sort().values >> (depth - level)) + trees * (2**level - 1))


def test_keys_are_found_in_the_run_that_holds_them() -> None:
    numbers = torch.randperm(1000, generator=torch.Generator().manual_seed(0)) * 2**50
    runs = [(part.sort().values.to(DEVICE), torch.arange(len(part), device=DEVICE) + low) for low, part in
            ((0, numbers[:600]), (600, numbers[600:601]), (601, numbers[601:601]))]  # fmt: skip
    keys = torch.cat([numbers[500:700], numbers[:5] + 1, torch.tensor([-1, 2**62])]).to(DEVICE)
    found = fused_rows.find(keys, runs).cpu()
    held = {int(key): int(place) for run_keys, places in runs for key, place in zip(run_keys.cpu(), places.cpu(), strict=True)}
    assert found.tolist() == [held.get(int(key), -1) for key in keys.cpu()]
    assert (found >= 0).sum() == 101


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_adam_is_that_of_the_cpu(betas: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[TreeLinear] = []
    for serves in (False, True):
        layer = random_tree(3, sizes=(9, 7), dtype=torch.float32, storage="lazy", full_depth=2, rank=2, gate="hash").to(DEVICE)
        optimizer = RowAdam(layer, lr=0.01, betas=betas, weight_decay=0.1)
        monkeypatch.setattr(fused_rows, "serves", lambda *_, serves=serves: serves)
        for number in range(4):
            gradients = [
                (store, rows, torch.randn(len(rows), store.width, generator=torch.Generator().manual_seed(number)).to(DEVICE))
                for _, store in layer.table.stores()
                for rows in [torch.arange(number % 2, store.size, 2, device=DEVICE)]
            ]
            optimizer.step_rows(gradients)
        layers.append(layer)
    for (_, plain), (_, fused) in zip(*(layer.table.stores() for layer in layers), strict=True):
        for name in ("exp_avg", "exp_avg_sq", "clock", "log_decay"):
            # Differences of numbers up to 4, rounded.
            torch.testing.assert_close(fused.state[name], plain.state[name], rtol=1e-6, atol=5e-7)
        # Quotients of moments, rounded a few times.
        torch.testing.assert_close(fused.data, plain.data, rtol=1e-5, atol=1e-7)


def test_where_triton_cannot_compile_torch_computes_and_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(fused_rows, "leaf_of", fail)
    fused_rows.is_working.cache_clear()
    with pytest.warns(UserWarning, match=r"here \(Failed to find C compiler\.\); trees are computed by torch alone"):
        assert not fused_rows.is_working(DEVICE)
    monkeypatch.undo()
    fused_rows.is_working.cache_clear()
    assert fused_rows.is_working(DEVICE)
