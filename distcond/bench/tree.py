"""`TreeLinear` against the least that its arithmetic and its memory traffic can take, and against a dense layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcond.bench.inference import bench_inference
from distcond.bench.report import Row
from distcond.bench.rivals import against
from distcond.bench.rivals.experts import NAME as EXPERTS
from distcond.bench.rivals.experts import against_experts
from distcond.bench.rivals.layers import (
    DEEPSPEED_MOE,
    FAST_FEEDFORWARD,
    MIXTRAL,
    against_deepspeed_moe,
    against_fast_feedforward,
    against_mixtral,
)
from distcond.bench.timing import CPU, Place, places, time_beside_limits
from distcond.bench.work import grown, passes, zipf
from distcond.nn import TreeLinear
from distcond.ops import TreePath


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
GRADIENTS = ("none", "sampled", "flip_sampled", "straight_through", "flip", "magnitude")
AGAINST_DENSE = [Case(6, 8192, 256, 6, gate_gradient=gradient) for gradient in GRADIENTS]
DEEP = [Case(20, 4096, 256, 6, rank, leaves=leaves) for rank in (1, 4) for leaves in ("uniform", "zipf")]


RIVALS = {
    DEEPSPEED_MOE: against_deepspeed_moe,
    EXPERTS: against_experts,
    MIXTRAL: against_mixtral,
    FAST_FEEDFORWARD: against_fast_feedforward,
}


def bench_tree(quick: bool = False) -> Iterator[Row]:
    """Forward and backward, lazily stored fp32 nodes that exist, one row a case and precision of the tokens; then inference
    of flattened trees, and rivals, each beside a tree.
    """
    for case in QUICK if quick else [*FULL_NODES, *AGAINST_DENSE, *DEEP]:
        for place in places():
            yield _row(case, place)
    yield from bench_inference(quick)
    yield from against(RIVALS, quick)


def _row(case: Case, place: Place) -> Row:
    torch.manual_seed(0)
    layer, x = prepared_layer(case, place)
    dense, grad = nn.Linear(case.width, case.width).to(place.device, place.dtype), torch.randn_like(x)
    one = x[:1].detach().requires_grad_()
    timed = {"tree": passes(layer, x, grad), "dense": passes(dense, x, grad), "calls": passes(dense, one, grad[:1])}
    times, machine = time_beside_limits(timed, place)
    parts = parts_of(case, layer, x)
    floor = machine.floor_ms(*work_of(parts))
    floor_of_parts = times["calls"].median + sum(machine.floor_ms(part.flops, part.traffic, part.reads) for part in parts)
    return {
        "device": place.device.type,
        "dtype": str(place.dtype).removeprefix("torch."),
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
        "time / parts": times["tree"].median / floor_of_parts,
        "time / dense": times["tree"].median / times["dense"].median,
    }


def prepared_layer(case: Case, place: Place = CPU) -> tuple[TreeLinear, Tensor]:
    """A layer and tokens, with every node that they pass; the rows are fp32 whatever the tokens."""
    shape = (case.width, case.width, case.depth, case.full_depth, case.rank)
    layer = TreeLinear(*shape, gate="hash", gate_gradient=case.gate_gradient, storage="lazy").to(place.device)
    x = torch.randn(case.tokens, case.width)
    if case.leaves == "zipf":  # some tokens come again, and with them their leaves
        x = x[torch.multinomial(zipf(case.tokens), case.tokens, replacement=True)].contiguous()
    x = x.to(place.device, place.dtype).requires_grad_()
    return grown(layer, x).eval(), x


@dataclass(frozen=True, slots=True)
class Part:
    """What one pass through the levels of one kind cannot do without."""

    flops: float
    reads: float
    "Bytes of nodes that are read while no gradient is written."
    copies: float
    "Bytes of nodes that are read and of their gradients that are written."
    vectors: float
    "Bytes of tokens and of their gradients."

    @property
    def traffic(self) -> float:
        """Bytes that are read while others are written."""
        return self.copies + self.vectors


def work_of(parts: list[Part]) -> tuple[float, float]:
    """FLOPs and bytes that forward and backward cannot do without, if all could be done at once.

    FLOPs: three products of each token with one full matrix (the levels added up) and with its low-rank factors, and the
    gates. Bytes: each touched node read once, its gradient written once.
    """
    return sum(part.flops for part in parts), sum(part.copies for part in parts)


def parts_of(case: Case, layer: TreeLinear, x: Tensor) -> list[Part]:
    """Forward and backward, of full and of low-rank levels: one begins when the one before has ended.

    Arithmetic and traffic may overlap in each, but backward has to read the nodes again, and tokens pass, too.
    """
    path = TreePath.of(layer.leaf(x)[:, 0], case.depth)
    touched = [len(level.nodes_G) for level in path.levels]
    full, low = sum(touched[: case.full_depth + 1]), sum(touched[case.full_depth + 1 :])
    factors = (case.depth - case.full_depth) * 2 * case.rank * case.width
    parts = []
    for macs, gates, numbers in (
        (case.width**2, case.depth * case.width, full * case.width * (case.width + 1)),
        (factors, 0, low * (2 * case.rank * case.width + case.width)),
    ):
        vectors = 4.0 * case.tokens * case.width * bool(numbers)
        parts.append(Part(2.0 * case.tokens * (macs + gates), 4.0 * numbers, 0.0, 2 * vectors))
        parts.append(Part(4.0 * case.tokens * macs, 0.0, 8.0 * numbers, 3 * vectors))
    return parts
