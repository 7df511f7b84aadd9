"""Whether a run can fit into this machine, judged before anything is started; torch is not needed for that.

NOTE: `distcond train` asks this first, and torch takes 1.5 s to import.
"""

import os

import psutil

from distcond.config import ClusterName, Config, DataConfig
from distcond.config.check import need
from distcond.config.cost import ModelCost, model_cost
from distcond.data.tasks import GENERATED
from distcond.data.tokens import vocabulary_of

BYTES_PER_ROW_NUMBER = 12
"fp32 weight and two moments."


def check_fits(config: Config) -> None:
    """Refuse a run whose nodes are sure not to fit into this machine. Raises ConfigError with bytes needed and available.

    Sure: dense storage holds every node, and a lazy table fills up to max_nodes; other tables grow with the data. Runs on
    other machines are not judged.
    """
    cluster, tree = config.cluster, config.model.tree
    if cluster.name != ClusterName.local or cluster.address or "RAY_ADDRESS" in os.environ:
        return
    cost = cost_of(config)
    needed = cluster.num_workers * dense_bytes(config, cost)
    if tree.max_nodes is not None:
        copies = cluster.num_workers // (cluster.expert_parallel_size or cluster.num_workers)
        needed += copies * BYTES_PER_ROW_NUMBER * cost.node_parameters
    available = psutil.virtual_memory().available
    need(
        needed <= available,
        f"model.tree.depth={tree.depth}, storage={tree.storage}, max_nodes={tree.max_nodes} needs {int(needed):,} bytes for "
        f"{cluster.num_workers} ranks' weights and moments, {available:,} are available; use a smaller depth, rank or max_nodes.",
    )


def cost_of(config: Config) -> ModelCost:
    """Closed-form cost of a configuration's model on its data."""
    is_text, input_size, output_size, length = sizes(config.data)
    return model_cost(config.model, is_text=is_text, input_size=input_size, output_size=output_size, length=length)


def dense_bytes(config: Config, cost: ModelCost) -> float:
    """Weights, gradients and Adam's moments of the dense part on one rank (Rajbhandari et al. 2020, arXiv 1910.02054)."""
    ranks, stage, number = config.cluster.num_workers, config.optim.zero_stage, cost.dense_parameters
    small = 2 if config.optim.precision == "bf16" else 4
    master = 4 if config.optim.precision == "bf16" or stage else 0
    weights = small * number / (ranks if stage == 3 else 1)
    gradients = small * number / (ranks if stage >= 2 else 1)
    return weights + gradients + (master + 8) * number / (ranks if stage >= 1 else 1)


def sizes(data: DataConfig) -> tuple[bool, int, int, int]:
    """Whether data are text; numbers a step going in and coming out; steps of an example. No text is opened."""
    if data.name in GENERATED:
        task = GENERATED[data.name](data)
        return False, task.input_size, task.output_size, task.max_length
    vocabulary = vocabulary_of(data.tokenizer)
    return True, vocabulary, vocabulary, data.context
