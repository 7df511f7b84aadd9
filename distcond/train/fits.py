"""Whether a run can fit into this machine, judged before anything is started; torch is not needed for that.

NOTE: `distcond train` asks this first, and torch takes 1.5 s to import.
"""

import os

import psutil

from distcond.config import ClusterName, Config
from distcond.config.check import need
from distcond.config.cost import ModelCost, model_cost
from distcond.config.run import check_reads
from distcond.data.tasks import shape_of

BYTES_PER_ROW_NUMBER = 12
"fp32 weight and two moments."


def check_fits(config: Config) -> None:
    """Refuse a run whose nodes are sure not to fit into this machine. Raises ConfigError with bytes needed and available.

    Sure: dense storage holds every node, and a lazy table fills up to max_nodes; other tables grow with the data. Runs on
    other machines are not judged.
    """
    cluster, tree = config.cluster, config.model.tree
    cost = cost_of(config)
    if cluster.name != ClusterName.local or cluster.address or "RAY_ADDRESS" in os.environ:
        return
    needed = cluster.num_workers * dense_bytes(config, cost)
    if tree.max_nodes is not None:
        copies = cluster.num_workers // (cluster.expert_parallel_size or cluster.num_workers)
        needed += copies * BYTES_PER_ROW_NUMBER * cost.node_parameters
    available = psutil.virtual_memory().available
    need(
        needed <= available,
        f"model.width={config.model.width}, tree.depth={tree.depth}, storage={tree.storage}, max_nodes={tree.max_nodes} needs "
        f"{int(needed):,} bytes for {cluster.num_workers} ranks' weights and moments, {available:,} are available; use a smaller "
        "width, depth, rank or max_nodes.",
    )


def cost_of(config: Config) -> ModelCost:
    """Closed-form cost of a configuration's model on its data; a model of another package is built for it, once."""
    shape = shape_of(config.data)
    check_reads(config.model.name, config.data.name, is_text=shape.kind == "bytes")
    if not config.model.is_shipped:
        key = repr((config.model, shape))
        if key not in _COSTS:
            from distcond.train.learner import cost_for, learner_for

            _COSTS[key] = cost_for(config.model, shape, learner_for(config, shape).body)
        return _COSTS[key]
    sizes = {"input_size": shape.input_size, "output_size": shape.output_size, "length": shape.max_length}
    return model_cost(config.model, is_text=shape.kind == "bytes", **sizes)


_COSTS: dict[str, ModelCost] = {}
"Of models of other packages, by configuration."


def dense_bytes(config: Config, cost: ModelCost) -> float:
    """Weights, gradients and Adam's moments of the dense part on one rank (Rajbhandari et al. 2020, arXiv 1910.02054)."""
    ranks, stage, number = config.cluster.num_workers, config.optim.zero_stage, cost.dense_parameters
    small = 2 if config.optim.precision == "bf16" else 4
    master = 4 if config.optim.precision == "bf16" or stage else 0
    weights = small * number / (ranks if stage == 3 else 1)
    gradients = small * number / (ranks if stage >= 2 else 1)
    return weights + gradients + (master + 8) * number / (ranks if stage >= 1 else 1)
