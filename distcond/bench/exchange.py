"""The exchange of one sharded layer: what it sends, what it takes among ranks of this machine, what it would take among many.

Legend: T tokens, Q in, P out, K depth (bits).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from distcond.bench.interconnect import Interconnect, predict
from distcond.bench.ranks import on_ranks
from distcond.bench.report import Row
from distcond.bench.timing import Timing, time_in_turn
from distcond.nn import TreeLinear
from distcond.table import Collective, NodeTable, Route, SubtreePlan

DEPTH, FULL_DEPTH, RANK = 20, 6, 4
RANKS, QUICK_RANKS = (2, 4), (2,)
SIZES = [(tokens, width) for width in (64, 256) for tokens in (512, 4096)]
"Tokens a rank, width of the layer."
QUICK_SIZES = [(64, 16)]
MANY_RANKS = (8, 64, 512, 4096)
FP32, INT64 = 4, 8


@dataclass(frozen=True, slots=True)
class Measured:
    """One rank's exchange, forward and backward of one layer."""

    exchange: Timing
    "Messages alone: all five all-to-alls of a step and the copies around them."
    step: Timing
    "Forward and backward of the layer, messages included."
    sent_bytes: int
    sent: int
    "Tokens that left the rank."
    received: int


def bench_exchange(quick: bool = False, interconnect: Interconnect | None = None) -> Iterator[Row]:
    """Milliseconds and bytes of one layer's exchange on 2 and 4 ranks, then the model for 8 to 4,096."""
    interconnect = interconnect or Interconnect()
    last: dict[tuple[int, int], list[Measured]] = {}
    for num_ranks in QUICK_RANKS if quick else RANKS:
        for size in QUICK_SIZES if quick else SIZES:
            last[size] = on_ranks(measure, num_ranks, *size)
            yield _row(num_ranks, *size, last[size])
    for (tokens, width), ranks in last.items():
        table = NodeTable(width, width, DEPTH, FULL_DEPTH, RANK, seed=0, bias=True)
        per_token = sum(rank.sent_bytes for rank in ranks) / sum(rank.sent for rank in ranks)
        local_ms = ranks[0].step.median - ranks[0].exchange.median
        for num_ranks in MANY_RANKS:
            yield predict(interconnect, num_ranks, tokens, table, per_token, local_ms)


def _row(num_ranks: int, tokens: int, width: int, ranks: list[Measured]) -> Row:
    first = ranks[0]
    counted = sum(rank.sent_bytes for rank in ranks)
    expected = sum(sum(exchange_bytes(rank.sent, rank.received, width, width, DEPTH, num_ranks)) for rank in ranks)
    return {
        "ranks": num_ranks,
        "tokens a rank": tokens,
        "width": width,
        "exchange ms": first.exchange.median,
        "from": first.exchange.low,
        "to": first.exchange.high,
        "step ms": first.step.median,
        "exchange / step": first.exchange.median / first.step.median,
        "MB sent": counted / 1e6,
        "counted / closed form": counted / expected,
    }


def exchange_bytes(sent: int, received: int, in_features: int, out_features: int, depth: int, num_ranks: int) -> tuple[int, int]:
    """Bytes that a rank sends for one fp32 layer: forward, backward.

    sent: its tokens that others own; received: others' tokens that it owns. Forward: the counts, rows with their leaves
    out, results back: 8(W - 1) + sent (4Q + 8) + 4 received P. Backward: gradients out, those of rows and of soft bits
    back: 4 sent P + 4 received (Q + K).
    """
    forward = INT64 * (num_ranks - 1) + sent * (FP32 * in_features + INT64) + FP32 * received * out_features
    backward = FP32 * sent * out_features + FP32 * received * (in_features + depth)
    return forward, backward


def measure(tokens: int, width: int) -> Measured:
    """A rank's work: its part in the exchange of one layer."""
    collective = Collective()
    torch.manual_seed(0)
    layer = TreeLinear(width, width, DEPTH, FULL_DEPTH, RANK, gate="hash", gate_gradient="sampled", storage="lazy")
    layer.shard(SubtreePlan.make(DEPTH, collective.size), collective)
    torch.manual_seed(1 + collective.rank)
    x, grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    owner = layer.plan.owner(layer.leaf(x)[:, 0])
    route = Route.to(owner, collective)
    step = _step(layer, x, grad)
    step()  # nodes are born
    before = collective.sent_bytes
    step()
    sent_bytes = collective.sent_bytes - before
    times = time_in_turn({"exchange": _messages(layer, x.detach(), grad, owner), "step": step})
    kept = route.send[collective.rank]
    return Measured(times["exchange"], times["step"], sent_bytes, tokens - kept, sum(route.receive) - kept)


def _step(layer: TreeLinear, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        layer(x).backward(grad)
        x.grad = None
        assert layer.table is not None
        for _, store in layer.table.stores():
            store.take_gradient()

    return step


def _messages(layer: TreeLinear, x: torch.Tensor, grad: torch.Tensor, owner: torch.Tensor) -> Callable[[], None]:
    """All that a forward and a backward pass of the layer exchange, with nothing computed between."""
    assert layer.collective is not None
    collective, leaf = layer.collective, layer.leaf(x)[:, 0]

    def messages() -> None:
        route = Route.to(owner, collective)
        local, _ = route.dispatch_with_leaf(x, leaf)
        route.combine(local)
        route.dispatch(grad)
        route.combine(torch.nn.functional.pad(local, (0, layer.depth)))

    return messages
