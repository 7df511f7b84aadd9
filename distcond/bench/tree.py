"""`TreeLinear` against the least that its arithmetic and its memory traffic can take, and against a dense layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcond.bench.report import Row
from distcond.bench.timing import time_beside_limits
from distcond.nn import TreeLinear
from distcond.ops import TreePath
from distcond.optim import RowAdam

ZIPF = 1.1
"Exponent of the leaves' frequencies where they are not uniform."


@dataclass(frozen=True, slots=True)
class Case:
    """One size of layer and batch."""

    depth: int
    tokens: int
    width: int
    full_depth: int
    rank: int = 1
    gate_gradient: str = "none"
    leaves: str = "uniform"


QUICK = [Case(4, 512, 64, 4), Case(6, 2048, 128, 6), Case(12, 512, 64, 4)]
FULL_NODES = [
    Case(depth, tokens, width, depth) for width in (64, 256, 512) for depth in (4, 7, 10) for tokens in (512, 2048, 8192)
]
AGAINST_DENSE = [Case(6, 8192, 256, 6, gate_gradient=gradient) for gradient in ("none", "sampled", "straight_through")]
DEEP = [Case(20, 4096, 256, 6, rank, leaves=leaves) for rank in (1, 4) for leaves in ("uniform", "zipf")]


def bench_tree(quick: bool = False) -> Iterator[Row]:
    """Forward and backward, fp32, lazily stored nodes that exist; one row a case."""
    for case in QUICK if quick else [*FULL_NODES, *AGAINST_DENSE, *DEEP]:
        yield _row(case)


def _row(case: Case) -> Row:
    torch.manual_seed(0)
    layer, x = prepared_layer(case)
    dense, grad = nn.Linear(case.width, case.width), torch.randn(case.tokens, case.width)
    times, machine = time_beside_limits({"tree": _step(layer, x, grad), "dense": _step(dense, x, grad)})
    floor = machine.floor_ms(*work_of(case, layer, x))
    return {
        "depth": case.depth,
        "full depth": case.full_depth,
        "rank": case.rank,
        "width": case.width,
        "tokens": case.tokens,
        "leaves": case.leaves,
        "gate gradient": case.gate_gradient,
        "ms": times["tree"].median,
        "from": times["tree"].low,
        "to": times["tree"].high,
        "floor ms": floor,
        "time / floor": times["tree"].median / floor,
        "time / dense": times["tree"].median / times["dense"].median,
    }


def prepared_layer(case: Case) -> tuple[TreeLinear, Tensor]:
    """A layer and tokens, with every node that they pass."""
    shape = (case.width, case.width, case.depth, case.full_depth, case.rank)
    layer = TreeLinear(*shape, gate="hash", gate_gradient=case.gate_gradient, storage="lazy")
    x = torch.randn(case.tokens, case.width)
    if case.leaves == "zipf":  # some tokens come again, and with them their leaves
        frequency = 1.0 / torch.arange(1, case.tokens + 1) ** ZIPF
        x = x[torch.multinomial(frequency, case.tokens, replacement=True)].contiguous()
    x.requires_grad_()
    layer(x).sum().backward()
    layer.eval()
    return layer, x


def work_of(case: Case, layer: TreeLinear, x: Tensor) -> tuple[float, float]:
    """FLOPs and bytes that forward and backward cannot do without.

    FLOPs: three products of each token with one full matrix (the levels added up) and with its low-rank factors, and the
    gates. Bytes: each touched node read once, its gradient written once.
    """
    path = TreePath.of(layer.leaf(x)[:, 0], case.depth)
    touched = [len(level.nodes_G) for level in path.levels]
    full, low = sum(touched[: case.full_depth + 1]), sum(touched[case.full_depth + 1 :])
    numbers = full * case.width * (case.width + 1) + low * (2 * case.rank * case.width + case.width)
    macs = case.width**2 + (case.depth - case.full_depth) * 2 * case.rank * case.width
    flops = 2 * case.tokens * (3 * macs + case.depth * case.width)
    return float(flops), 8.0 * numbers


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    rows = RowAdam(layer)

    def step() -> None:
        layer(x).backward(grad)
        x.grad = None
        layer.zero_grad()
        rows.zero_grad()

    return step
