"""Layers that send each token to one of many weights, beside trees of the same width and number of leaves: one of full matrices
alone, and one whose levels below the fourth are of low rank.

Every node that the tokens pass exists before a clock starts, as every expert does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcond.bench.ranks import on_ranks
from distcond.bench.report import Row
from distcond.bench.timing import Timing, time_in_turn
from distcond.bench.work import grown, passes
from distcond.nn import TreeLinear
from distcond.optim import RowAdam
from distcond.table import Collective, SubtreePlan

GATE_GRADIENT = "sampled"
"The tree's gates learn, as its rivals' do; of the ways to, the one that costs one product a step."
LOW_RANK: dict[str, Any] = {"full_depth": 4, "rank": 4}
"Of the second tree."
LR = 1e-5
"Of all updates: small, so that the last round routes as the first one did."


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the rival and of the tree beside it."""

    tokens: int
    width: int
    depth: int
    "The rival has 2**depth experts."
    matrices: int = 1
    """Mixtral's MACs of a token, in matrices of width x width: 1, which is what a merged tree computes, or depth + 1, which is
    what the path holds."""


class DeepSpeedMoE(nn.Module):
    """DeepSpeed's mixture of linear experts, one expert a token, at its default capacity."""

    def __init__(self, shape: Shape, num_ranks: int = 1) -> None:
        super().__init__()
        from distcond.train.deepspeed_start import start_process_group

        start_process_group()
        from deepspeed.moe.layer import MoE

        self.moe = MoE(shape.width, nn.Linear(shape.width, shape.width), 2**shape.depth, num_ranks, k=1)
        self.moe.set_deepspeed_parallelism()

    def forward(self, x_TQ: Tensor) -> Tensor:
        """[T, Q] -> [T, Q]."""
        return self.moe(x_TQ)[0]  # type: ignore[no-any-return]


class Mixtral(nn.Module):
    """The sparse block of Mixtral in transformers, two experts a token, by grouped products.

    An expert has three matrices of width x hidden; two experts with hidden = width / 6 take as many MACs as one matrix.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        sizes = {"hidden_size": shape.width, "intermediate_size": shape.matrices * shape.width // 6}
        config = MixtralConfig(**sizes, num_local_experts=2**shape.depth, num_experts_per_tok=2)
        config._experts_implementation = "grouped_mm"
        self.block = MixtralSparseMoeBlock(config)
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, std=shape.width**-0.5)

    def forward(self, x_TQ: Tensor) -> Tensor:
        """[T, Q] -> [T, Q]."""
        return self.block(x_TQ[None])[0]  # type: ignore[no-any-return]


class FastFeedforward(nn.Module):
    """fastfeedforward's FFF with leaves of two matrices of width x width / 2: as many MACs as one matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from fastfeedforward import FFF

        self.layer = FFF(shape.width, shape.width // 2, shape.width, shape.depth)

    def forward(self, x_TQ: Tensor) -> Tensor:
        """[T, Q] -> [T, Q]."""
        return self.layer(x_TQ)  # type: ignore[no-any-return]


QUICK = Shape(tokens=64, width=48, depth=3)
DEEPSPEED_MOE, DEEPSPEED_SHAPES = "DeepSpeed MoE", [Shape(256, 64, 10), Shape(2048, 128, 10)]
MIXTRAL, MIXTRAL_SHAPES = (
    "Mixtral block, grouped_mm",
    [
        Shape(256, 192, 8),
        Shape(2048, 192, 8),
        Shape(2048, 192, 8, matrices=9),
        Shape(8192, 384, 8),
    ],
)
FAST_FEEDFORWARD, FAST_FEEDFORWARD_SHAPES = "fastfeedforward", [Shape(256, 64, 8)]


def against_deepspeed_moe(quick: bool) -> Iterator[Row]:
    """On one rank, and on two that share experts and tree."""
    shapes = [QUICK] if quick else DEEPSPEED_SHAPES
    yield from _against(DEEPSPEED_MOE, DeepSpeedMoE, shapes)
    for shape in shapes:
        times = on_ranks(time_on_two_ranks, 2, shape)[0]
        yield _row(DEEPSPEED_MOE, shape, 2, "forward, backward", times)


def against_mixtral(quick: bool) -> Iterator[Row]:
    """On one rank."""
    yield from _against(MIXTRAL, Mixtral, [QUICK] if quick else MIXTRAL_SHAPES)


def against_fast_feedforward(quick: bool) -> Iterator[Row]:
    """On one rank, in training."""
    yield from _against(FAST_FEEDFORWARD, FastFeedforward, [QUICK] if quick else FAST_FEEDFORWARD_SHAPES)


def _against(name: str, make: Callable[[Shape], nn.Module], shapes: Sequence[Shape]) -> Iterator[Row]:
    for shape in shapes:
        torch.manual_seed(0)
        x, grad = torch.randn(shape.tokens, shape.width, requires_grad=True), torch.randn(shape.tokens, shape.width)
        layers = {"rival": make(shape)} | {tree: grown(layer, x) for tree, layer in _trees(shape).items()}
        for what, step in (("forward, backward", passes), ("forward, backward, update", _update)):
            yield _row(name, shape, 1, what, time_in_turn({key: step(layer, x, grad) for key, layer in layers.items()}))


def _row(name: str, shape: Shape, num_ranks: int, passes: str, times: dict[str, Timing]) -> Row:
    return {
        "rival": name,
        "passes": passes,
        "ranks": num_ranks,
        "tokens a rank": shape.tokens,
        "width": shape.width,
        "experts, leaves": 2**shape.depth,
        "MACs / width^2": shape.matrices,
        "ms": times["rival"].median,
        "from": times["rival"].low,
        "to": times["rival"].high,
        "tree ms": times["tree"].median,
        "rival / tree": times["rival"].median / times["tree"].median,
        "low-rank tree ms": times["low-rank tree"].median,
        "rival / low-rank tree": times["rival"].median / times["low-rank tree"].median,
    }


def _trees(shape: Shape) -> dict[str, TreeLinear]:
    sizes = (shape.width, shape.width, shape.depth)
    low = {} if shape.depth <= LOW_RANK["full_depth"] else LOW_RANK
    return {
        name: TreeLinear(*sizes, gate_gradient=GATE_GRADIENT, storage="lazy", **options)
        for name, options in (("tree", {}), ("low-rank tree", low))
    }


def _update(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """The same and Adam: torch's fused one, and by rows where there are rows."""
    adam = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], LR, fused=True)
    rows = RowAdam(layer, LR)

    def step() -> None:
        layer(x).backward(grad)
        x.grad = None
        adam.step()
        rows.step()
        layer.zero_grad()

    return step


def time_on_two_ranks(shape: Shape) -> dict[str, Timing]:
    """Forward and backward of both layers, sharded over the ranks of the group: a rank's work."""
    torch.manual_seed(0)
    collective = Collective()
    rival, trees = DeepSpeedMoE(shape, collective.size), _trees(shape)
    torch.manual_seed(1 + collective.rank)
    x, grad = torch.randn(shape.tokens, shape.width, requires_grad=True), torch.randn(shape.tokens, shape.width)
    for tree in trees.values():
        tree.shard(SubtreePlan.make(shape.depth, collective.size), collective)
        grown(tree, x)
    return time_in_turn({name: passes(layer, x, grad) for name, layer in ({"rival": rival} | trees).items()})
