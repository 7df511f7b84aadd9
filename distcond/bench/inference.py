"""Inference of flattened trees against a dense layer of the same width: many tokens at a time, and one."""

import copy
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor, nn

from distcond.bench.report import Row
from distcond.bench.timing import CPU, time_beside_limits
from distcond.bench.work import zipf
from distcond.nn import FlatTree, TreeLinear, flatten

COLD_NUMBERS = 2**25
"Numbers in the copies of a layer that take turns: 128 MiB, so that each comes from memory."
SINGLE_TOKENS = 64
"Tokens that are timed one at a time, together."


def bench_inference(quick: bool = False) -> Iterator[Row]:
    """fp32, leaves of Zipf-distributed tokens; one row a case, with the columns of `bench_tree`."""
    for width in (64,) if quick else (256, 512, 1024):
        for depth in (2, 6) if quick else (2, 4, 6):
            layer, x = zipf_tree(depth, width, tokens=512 if quick else 4096)
            flat = flatten(layer)
            pair = {"flat": flat, "dense": _dense(width)}
            yield _row(flat, x, "flattened", {name: _call(each, x) for name, each in pair.items()})
            singles = x[:SINGLE_TOKENS, None].unbind()
            for what, numbers in (("flattened, both warm", 0), ("flattened, both cold", 2**16 if quick else COLD_NUMBERS)):
                turns = {name: _one_by_one(_copies(each, numbers), singles) for name, each in pair.items()}
                yield _row(flat, x[:1], what, turns, calls=len(singles))


def _row(flat: FlatTree, x: Tensor, what: str, functions: dict[str, Callable[[], object]], calls: int = 1) -> Row:
    times, machine = time_beside_limits(functions, CPU)
    width, tokens = flat.in_features, len(x)
    read = min(tokens, 2**flat.depth) * width * (width + 1)
    floor = machine.floor_ms(2.0 * tokens * width * (width + flat.depth), 4.0 * read)
    ms, low, high = (number / calls for number in (times["flat"].median, times["flat"].low, times["flat"].high))
    return {
        "device": "cpu",
        "dtype": "float32",
        "depth": flat.depth,
        "full depth": flat.depth,
        "rank": 1,
        "width": width,
        "tokens": tokens,
        "leaves": "zipf",
        "gate gradient": what,
        "ms": ms,
        "from": low,
        "to": high,
        "floor ms": floor,
        "time / floor": ms / floor,
        "time / dense": times["flat"].median / times["dense"].median,
    }


@torch.no_grad()
def zipf_tree(depth: int, width: int, tokens: int) -> tuple[TreeLinear, Tensor]:
    """A tree with numbers in every node, whose bits are the signs of the first inputs; and tokens of Zipf-frequent leaves."""
    torch.manual_seed(0)
    layer = TreeLinear(width, width, depth, gate="hash").eval()
    layer.weight.normal_(std=width**-0.5)
    assert layer.gate is not None
    layer.gate.weight.copy_(torch.eye(depth, width))
    leaf_T = torch.randperm(2**depth)[torch.multinomial(zipf(2**depth), tokens, replacement=True)]
    bits_TK = (leaf_T[:, None] >> torch.arange(depth - 1, -1, -1)) & 1
    x = torch.randn(tokens, width)
    x[:, :depth] = x[:, :depth].abs() * (2 * bits_TK - 1)
    return layer, x


def _dense(width: int) -> nn.Module:
    return nn.Linear(width, width).requires_grad_(False)


def _call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def _copies(layer: nn.Module, numbers: int) -> Iterator[nn.Module]:
    """Turns of as many copies as hold so many numbers, at least one."""
    held = sum(tensor.numel() for tensor in layer.state_dict().values())
    return cycle([copy.deepcopy(layer) for _ in range(max(1, numbers // held))])


def _one_by_one(layers: Iterator[nn.Module], singles: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> None:
        for layer, x in zip(layers, singles, strict=False):
            layer(x)

    return run
