"""From sums to metrics: what a step reports, pooled over ranks.

Names are given in the README; every one has a unit or is dimensionless.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from distcond.nn import TreeLinear
from distcond.nn.model import SUMS, Learner
from distcond.table import Collective
from distcond.train.table_files import tree_layers


def quality(sums: Tensor, *, is_text: bool, prefix: str, bytes_per_token: float = 1.0) -> dict[str, float]:
    """Losses and errors from figures in the order of SUMS, summed over ranks; NaN where nothing was counted.

    bytes_per_token: of the text that was predicted, so that bits are told per byte whatever it is cut into.
    """
    figure = dict(zip(SUMS, sums.tolist(), strict=True))
    if is_text:
        return {
            f"{prefix}/bpb": _ratio(figure["nll"], figure["elements"]) / math.log(2) / bytes_per_token,
            f"{prefix}/element_error": _ratio(figure["element_errors"], figure["elements"]),
        }
    return {
        f"{prefix}/nll": _ratio(figure["nll"], figure["sequences"]),
        f"{prefix}/sequence_error": _ratio(figure["sequence_errors"], figure["asked_sequences"]),
        f"{prefix}/element_error": _ratio(figure["element_errors"], figure["elements"]),
    }


def mean_loss(sums: Tensor, learner: Learner) -> float:
    """Loss per target byte or token (text) or per sequence, with the penalty as it is now."""
    figure = dict(zip(SUMS, sums.tolist(), strict=True))
    figures = quality(sums, is_text=learner.is_text, prefix="train")
    nll = figures["train/bpb"] * math.log(2) if learner.is_text else figures["train/nll"]
    per_count = 1.0 if learner.is_text else _ratio(figure["positions"], figure["sequences"])
    cost = learner.time_penalty * ponder(sums)["ponder/cost"] * per_count
    return nll + cost - learner.entropy_weight * _ratio(figure["entropy"], figure["positions"]) * per_count


def is_better(value: float, best: Mapping[str, Any] | None) -> bool:
    """Whether a figure, of which less is better, beats the best so far (`value` of it; None: the first); NaN never does."""
    return math.isfinite(value) and (best is None or value < best["value"])


def ponder(sums: Tensor, prefix: str = "ponder") -> dict[str, float]:
    """Mean steps N, ponder cost N + R and remainder R of a position."""
    figure = dict(zip(SUMS, sums.tolist(), strict=True))
    return {
        f"{prefix}/steps": _ratio(figure["ponder_steps"], figure["positions"]),
        f"{prefix}/cost": _ratio(figure["ponder_cost"], figure["positions"]),
        f"{prefix}/remainder": _ratio(figure["remainder"], figure["positions"]),
    }


def tree_usage(
    model: nn.Module,
    world: Collective,
    expert: Collective,
    note: Callable[[str, TreeLinear, Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """How the tokens since the last call spread over a tree's leaves, mean over trees and layers; nodes that exist, of all.

    A collective call. leaf_entropy_nats: of the load; load_max_over_mean: busiest leaf over the mean of all 2**K;
    dead_leaves: leaves without a token; capped_pct: tokens whose path ended above its leaf, for their table is full;
    rank_load_max_over_mean: tokens that the busiest rank served. nonfinite_inputs: rows with a NaN or infinite gate, summed
    over layers. note: told of each layer by name, with its leaves (tree << depth | leaf) and their tokens on all ranks.
    """
    rows: list[dict[str, float]] = []
    nodes, nonfinite = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    replicated = 0.0
    for name, layer in tree_layers(model).items():
        nonfinite += layer.take_nonfinite()
        leaf_G, count_G = layer.take_leaf_loads()
        union_G = world.gather_union(leaf_G)
        load_G = torch.zeros(len(union_G), dtype=torch.float64, device=leaf_G.device)
        load_G[torch.searchsorted(union_G, leaf_G)] = count_G.double()
        total = max(1.0, float(world.sum_(load_G).sum()))
        if note is not None:
            note(name, layer, union_G, load_G)
        served = torch.zeros(1 + world.size, dtype=torch.float64)
        served[0] = 0 if layer.table is None else layer.table.growth.take_capped()
        served[1 + world.rank] = float(count_G.sum())
        capped, *rank_loads = world.sum_(served).tolist()
        rows.append(
            {
                **_spread(load_G / total, union_G >> layer.depth, layer),
                "tree/capped_pct": 100 * capped / total,
                "tree/rank_load_max_over_mean": max(rank_loads) * world.size / total,
            }
        )
        if layer.table is None:
            replicated += layer.num_materialized
            continue
        for _, store in layer.table.stores():
            everywhere = layer.plan.node_owner(store.keys) < 0
            replicated += float(everywhere.sum())
            nodes += float((~everywhere).sum())
    if not rows:
        return {}
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    totals = {
        "tree/nonfinite_inputs": float(world.sum_(nonfinite)),
        "tree/materialized_nodes": float(expert.sum_(nodes)) + replicated,
    }
    return {**mean, **totals}


def _spread(share_G: Tensor, tree_G: Tensor, layer: TreeLinear) -> dict[str, float]:
    """Figures of one layer from its leaves' shares of all tokens, of which every tree got as many as the next."""
    share_G = share_G * layer.num_trees  # of the tokens of its tree
    most_M = share_G.new_zeros(layer.num_trees).scatter_reduce_(0, tree_G, share_G, "amax")
    return {
        "tree/leaf_entropy_nats": float(-(share_G * share_G.clamp(min=1e-300).log()).sum()) / layer.num_trees,
        "tree/load_max_over_mean": float(most_M.mean()) * 2**layer.depth if len(share_G) else math.nan,
        "tree/dead_leaves": 2**layer.depth - len(share_G) / layer.num_trees,
    }


@dataclass(slots=True)
class Meter:
    """Sums and seconds since the last row of metrics."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(len(SUMS), dtype=torch.float64))
    steps: int = 0
    skipped: int = 0
    data_wait_s: float = 0.0
    exchange_s: float = 0.0
    "Reading of the collective's clock when the window began."
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def paused(self, expert: Collective) -> Iterator[None]:
        """What happens inside, exchanges included, takes no time of the window."""
        start, exchanged_s = time.perf_counter(), expert.elapsed_s
        yield
        self.started += time.perf_counter() - start
        self.exchange_s += expert.elapsed_s - exchanged_s

    def performance(self, expert: Collective, tokens: float) -> dict[str, float]:
        """Speed of the window; `tokens` counts positions over all ranks."""
        elapsed = time.perf_counter() - self.started
        return {
            "perf/tokens_per_s": tokens / elapsed,
            "perf/step_ms": 1e3 * elapsed / max(1, self.steps),
            "perf/data_wait_pct": 100 * self.data_wait_s / elapsed,
            "perf/exchange_pct": 100 * (expert.elapsed_s - self.exchange_s) / elapsed,
            "mem/rss_gib": psutil.Process().memory_info().rss / 2**30,
        }


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
