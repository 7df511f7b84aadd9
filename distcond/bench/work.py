"""Work that several benches time: passes of a layer; and how often leaves come where they are not uniform."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distcond.nn import TreeLinear
from distcond.optim import RowAdam

ZIPF = 1.1
"Exponent of the frequencies."


def passes(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward, whose gradients are forgotten; x asks for one."""
    rows = RowAdam(layer)

    def step() -> None:
        layer(x).backward(grad)
        x.grad = None
        layer.zero_grad()
        rows.zero_grad()

    return step


def grown(layer: TreeLinear, x: Tensor) -> TreeLinear:
    """A layer with every node that these tokens pass; under a plan, a collective call. The next `RowAdam` keeps them.

    NOTE: all are filled with numbers. Rows of zeros that nobody wrote to are one page of the system's, which is read from a
    cache however many they are: with them forward and backward of large tables took half of the time.
    """
    layer(x).sum().backward()
    x.grad = None
    layer.zero_grad()
    assert layer.table is not None
    for _, store in layer.table.stores():
        store.data.normal_(std=layer.in_features**-0.5)
    return layer


def zipf(number: int) -> Tensor:
    """Relative frequencies of so many leaves, the most frequent first."""
    return 1.0 / torch.arange(1, number + 1) ** ZIPF
