"""A model of what sharding one layer costs among many ranks, from bytes that were counted among a few."""

from dataclasses import dataclass

from distcond.bench.report import Row
from distcond.table import NodeTable, SubtreePlan

LATENCY_US, BANDWIDTH_GB_S = 5.0, 25.0
"""Of one message, and of one rank's link: an InfiniBand HDR port carries 200 Gb/s (its data sheet), and a small message
between hosts takes a few microseconds over MPI or NCCL."""
MESSAGES = 5
"All-to-alls of a layer in a step: counts, rows, results; gradients, their results."
FP32 = 4


@dataclass(frozen=True, slots=True)
class Interconnect:
    """What joins the ranks. A message of n bytes takes latency + n / bandwidth (Hockney 1994)."""

    latency_us: float = LATENCY_US
    bandwidth_gb_s: float = BANDWIDTH_GB_S

    def all_to_all_ms(self, num_ranks: int, calls: int, sent_bytes: float) -> float:
        """Pairwise or Bruck's algorithm, whichever is faster, for `calls` all-to-alls of `sent_bytes` together.

        Pairwise: (W - 1) messages a call, each byte sent once. Bruck: ceil(log2 W) messages, each of half the
        buffer, a rank's own part included. Source: Thakur, Rabenseifner & Gropp 2005, Optimization of Collective Communication
        Operations in MPICH, section 4.3.
        """
        rounds = (num_ranks - 1).bit_length()
        buffer_bytes = sent_bytes * num_ranks / (num_ranks - 1)
        pairwise = self._ms(calls * (num_ranks - 1), sent_bytes)
        return min(pairwise, self._ms(calls * rounds, rounds * buffer_bytes / 2))

    def all_reduce_ms(self, num_ranks: int, size_bytes: float) -> float:
        """Recursive halving and doubling: 2 log2 W messages, 2 (W - 1) / W of the bytes (the same, section 4.5)."""
        return self._ms(2 * (num_ranks - 1).bit_length(), 2 * (num_ranks - 1) / num_ranks * size_bytes)

    def _ms(self, messages: float, size_bytes: float) -> float:
        return 1e-3 * self.latency_us * messages + 1e-6 * size_bytes / self.bandwidth_gb_s


def predict(
    interconnect: Interconnect, num_ranks: int, tokens: int, table: NodeTable, bytes_per_token: float, local_ms: float
) -> Row:
    """One layer, forward and backward and the sum of the replicated rows' gradients, on so many ranks.

    With W ranks of T tokens, leaves uniform, (W - 1) / W of a rank's tokens leave it, `bytes_per_token` each in five
    all-to-alls. Rows above the plan's shard level are on every rank, and their gradients are all-reduced once a step:
    2**s - 1 nodes, for s = log2(4 W) levels. local_ms: the rest of the step, on one thread of this machine. Neither
    unequal loads nor congestion are in the model.
    """
    sent = tokens * (num_ranks - 1) / num_ranks * bytes_per_token
    level = SubtreePlan.make(table.depth, num_ranks).shard_level
    full = min(2**level - 1, table.num_full_ids)
    shared = FP32 * (full * table.full.width + (2**level - 1 - full) * table.low.width)
    exchange_ms = interconnect.all_to_all_ms(num_ranks, MESSAGES, sent)
    shared_ms = interconnect.all_reduce_ms(num_ranks, shared)
    return {
        "model: ranks": num_ranks,
        "tokens a rank": tokens,
        "width": table.in_features,
        "bytes a token": bytes_per_token,
        "MB exchanged": sent / 1e6,
        "exchange ms": exchange_ms,
        "MB of shared rows": shared / 1e6,
        "shared rows ms": shared_ms,
        "rest of step ms": local_ms,
        "both / step": (exchange_ms + shared_ms) / (exchange_ms + shared_ms + local_ms),
    }
