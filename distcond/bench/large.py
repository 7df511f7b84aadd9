"""A table of 10^9 numbers on two ranks, beside one of 10^6 that the same number of nodes is touched of."""

import resource
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distcond.bench.ranks import on_ranks
from distcond.bench.report import Row
from distcond.bench.timing import Timing, time_in_turn
from distcond.nn import TreeLinear
from distcond.ops import TreePath
from distcond.optim import RowAdam
from distcond.optim.row_adam import add_state
from distcond.optim.sharded import ShardedRows
from distcond.table import Collective

NUM_RANKS = 2
WIDTH, DEPTH, FULL_DEPTH, RANK = 64, 20, 6, 4
"Low-rank nodes of 576 numbers; all 2**21 nodes would be 1.2e9 numbers."
NUMBERS, QUICK_NUMBERS = 10**9, 2 * 10**6
"In the larger table."
TOKENS = 32
"A rank and step. With as many tokens, each a leaf of its own, the smaller table holds about 10^6 numbers."
STEPS = 51
"That are timed: steps of two ranks that wait for each other scatter by a quarter."
CHUNK = 2**16


@dataclass(frozen=True, slots=True)
class Measured:
    """One rank's part of both tables."""

    small: Timing
    large: Timing
    small_numbers: int
    large_numbers: int
    touched: tuple[int, int]
    "Nodes on the paths of this rank's tokens in a step, in the smaller and the larger table."
    peak_bytes: int


def bench_large(quick: bool = False) -> Iterator[Row]:
    """A whole step: exchange, forward, backward, reduction of the gradients, update."""
    ranks = on_ranks(measure, NUM_RANKS, QUICK_NUMBERS if quick else NUMBERS)
    first = ranks[0]
    yield {
        "ranks": NUM_RANKS,
        "numbers": sum(rank.large_numbers for rank in ranks),
        "touched nodes": sum(rank.touched[1] for rank in ranks),
        "step ms": first.large.median,
        "from": first.large.low,
        "to": first.large.high,
        "GiB, all ranks": sum(rank.peak_bytes for rank in ranks) / 2**30,
        "against numbers": sum(rank.small_numbers for rank in ranks),
        "its touched nodes": sum(rank.touched[0] for rank in ranks),
        "its ms": first.small.median,
        "ratio": first.large.median / first.small.median,
    }


def measure(numbers: int) -> Measured:
    """A rank's work: its part of both tables."""
    small, large = _Table(num_tokens=TOKENS), _Table(num_tokens=512 * TOKENS)
    large.grow(numbers // NUM_RANKS)
    for table in (small, large):
        table.visit_all()
    times = time_in_turn({"small": small.step, "large": large.step}, STEPS)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = (small.num_numbers, large.num_numbers)
    return Measured(times["small"], times["large"], *sizes, (small.count_touched(), large.count_touched()), peak)


class _Table:
    """A sharded layer, and the tokens that its steps draw from."""

    def __init__(self, num_tokens: int) -> None:
        torch.manual_seed(0)
        layer = TreeLinear(WIDTH, WIDTH, DEPTH, FULL_DEPTH, RANK, gate="hash", gate_gradient="none", storage="lazy")
        world = Collective()
        self.layer, self.rank = layer.eval(), world.rank  # a threshold that moved would send tokens to leaves of no node
        self.rows = ShardedRows(layer, RowAdam(layer), world=world, expert=Collective(), replica=Collective.alone())
        torch.manual_seed(1 + self.rank)
        self.tokens, self.grad = torch.randn(num_tokens, WIDTH), torch.randn(TOKENS, WIDTH)

    @property
    def num_numbers(self) -> int:
        """Numbers in nodes of this rank."""
        assert self.layer.table is not None
        return sum(store.size * store.width for _, store in self.layer.table.stores())

    def grow(self, numbers: int) -> None:
        """Let low-rank nodes be born, from the shallowest on, until this rank holds so many numbers, moments beside them."""
        table = self.layer.table
        assert table is not None
        first = table.num_full_ids
        while self.num_numbers < numbers and first < 2 ** (DEPTH + 1) - 1:
            nodes = torch.arange(first, min(first + CHUNK, 2 ** (DEPTH + 1) - 1))
            owner = self.layer.plan.node_owner(nodes)
            table.ensure_rows("low", nodes[(owner < 0) | (owner == self.rank)])
            first += CHUNK
        add_state(table.low)
        for value in table.low.state.values():
            value.fill_(1)  # takes the memory

    def visit_all(self) -> None:
        """A step of every token: the nodes of all exist from here on, and none is born in a step that is timed."""
        for tokens_TQ in self.tokens.split(TOKENS):
            self.step(tokens_TQ)

    def step(self, tokens_TQ: Tensor | None = None) -> None:
        """Forward, backward, reduction, update; of tokens that are drawn unless they are given."""
        tokens_TQ = self._draw() if tokens_TQ is None else tokens_TQ.clone()
        self.layer(tokens_TQ.requires_grad_()).backward(self.grad)
        self.rows.reduce_gradients()
        self.rows.step(lr=1e-5, scale=1.0)

    def count_touched(self) -> int:
        """Nodes on the paths of this rank's tokens in a step like the timed ones."""
        path = TreePath.of(self.layer.leaf(self._draw())[:, 0], DEPTH)
        return sum(len(level.nodes_G) for level in path.levels)

    def _draw(self) -> Tensor:
        """Tokens of a step, no two of them the same."""
        return self.tokens[torch.randperm(len(self.tokens))[:TOKENS]]
