"""storage="host": the same training from copies of the touched rows, which stay where they are."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distcond.nn import TreeLinear
from distcond.optim import RowAdam
from tests.trees import seed_cpu, tokens


def trained(storage: str, **options: Any) -> tuple[TreeLinear, list[Tensor]]:
    """A layer after some steps; what it computed, gradients, and its rows.

    NOTE: rows are a whole number of 64 bytes long, for BLAS may round by where in memory a matrix begins.
    """
    seed_cpu(0)
    layer = TreeLinear(16, 16, 4, storage=storage, full_depth=2, rank=2, **options)
    optimizer = RowAdam(layer, lr=0.1, weight_decay=0.1)
    seen: list[Tensor] = []
    for step in range(3):
        x = tokens(9, 16, seed=step).float().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        seen += [y, x.grad, *(parameter.grad for parameter in layer.parameters())]
        optimizer.step()
        layer.zero_grad()
    assert layer.table is not None
    for _, store in layer.table.stores():
        seen += [store.keys, store.data, *store.state.values()]
    return layer, seen


@pytest.mark.parametrize("gate_gradient", ["straight_through", "magnitude"])
def test_training_is_that_of_rows_beside_the_layer(gate_gradient: str) -> None:
    (_, host), (_, lazy) = (trained(storage, gate_gradient=gate_gradient) for storage in ("host", "lazy"))
    assert len(host) == len(lazy) and all(torch.equal(one, other) for one, other in zip(host, lazy, strict=True))


def test_rows_stay_on_the_host_when_the_layer_moves() -> None:
    layer, seen = trained("host")
    assert layer.table is not None
    layer.to("meta")
    assert layer.seed.device.type == "meta"
    for _, store in layer.table.stores():
        assert {part.device.type for part in (store.data, store.keys, *store.state.values())} == {"cpu"}
    assert any(torch.equal(layer.table.full.data, part) for part in seen)
    assert layer.double().table.full.data.dtype == torch.float64  # type: ignore[union-attr]
