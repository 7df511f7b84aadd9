"""What a run would be, without starting it: parameters, computation, placement, memory."""

import os
from collections import Counter
from dataclasses import replace

import psutil

from distcond.config import ClusterName, Config, DataConfig, DataName, GateName, HaltingKind
from distcond.config.check import need
from distcond.data.graves import logic, parity
from distcond.nn.cost import ModelCost, model_cost
from distcond.table import SubtreePlan

BYTES_PER_ROW_NUMBER = 12
"fp32 weight and two moments."


def describe(config: Config) -> str:
    """Parameters, MACs, sharding plan and bytes per rank of a run; the corpus is not opened."""
    cost = cost_of(config)
    halting, tree, cluster = config.model.halting, config.model.tree, config.cluster
    most = {HaltingKind.none: 1, HaltingKind.fixed: halting.max_steps, HaltingKind.act: halting.max_steps}[halting.kind]
    lines = [
        f"dense parameters    {cost.dense_parameters:,}",
        f"node parameters     {_count(cost.node_parameters)} if every node comes to exist{_limit(config)}",
        f"MACs per position   {cost.macs(1):,.0f} with 1 ponder step, {cost.macs(most):,.0f} with {most}",
        f"ranks               {cluster.num_workers}, ZeRO {config.optim.zero_stage}, {config.optim.precision}",
        f"memory per rank     {_dense_bytes(config, cost) / 2**20:,.1f} MiB for the dense part",
    ]
    if cost.node_parameters:
        size = cluster.expert_parallel_size or cluster.num_workers
        plan = SubtreePlan.make(tree.depth, size, cluster.shard_level, tree.num_trees)
        shared = f"levels 0 to {plan.shard_level - 1} on every rank, " if plan.shard_level else ""
        subtrees = f"{shared}{len(plan.owner_S)} subtrees over {size} ranks"
        where = subtrees if plan.is_sharded else "every rank holds every node"
        rows = _count(BYTES_PER_ROW_NUMBER * _fullest_rank(config, cost, plan))
        lines += [f"sharding plan       {where}", f"                    up to {rows} bytes of rows per rank"]
    return "\n".join(lines)


def check_fits(config: Config) -> None:
    """Refuse a run whose nodes are sure not to fit into this machine. Raises ConfigError with bytes needed and available.

    Sure: dense storage holds every node, and a lazy table fills up to max_nodes; other tables grow with the data. Runs on
    other machines are not judged.
    """
    cluster, tree = config.cluster, config.model.tree
    if cluster.name != ClusterName.local or cluster.address or "RAY_ADDRESS" in os.environ:
        return
    cost = cost_of(config)
    needed = cluster.num_workers * _dense_bytes(config, cost)
    if tree.max_nodes is not None:
        copies = cluster.num_workers // (cluster.expert_parallel_size or cluster.num_workers)
        needed += copies * BYTES_PER_ROW_NUMBER * cost.node_parameters
    available = psutil.virtual_memory().available
    need(
        needed <= available,
        f"model.tree.depth={tree.depth}, storage={tree.storage}, max_nodes={tree.max_nodes} needs {int(needed):,} bytes for "
        f"{cluster.num_workers} ranks' weights and moments, {available:,} are available; use a smaller depth, rank or max_nodes.",
    )


def _limit(config: Config) -> str:
    most = config.model.tree.max_nodes
    return "" if most is None else f", of at most {most:,}"


def cost_of(config: Config) -> ModelCost:
    """Closed-form cost of a configuration's model on its data."""
    is_text, input_size, output_size, length = _sizes(config.data)
    return model_cost(config.model, is_text=is_text, input_size=input_size, output_size=output_size, length=length)


def _fullest_rank(config: Config, cost: ModelCost, plan: SubtreePlan) -> int:
    """Node parameters of the rank that holds most if every node exists: the levels on every rank, and its subtrees."""
    if config.model.tree.max_nodes is not None:  # all of them may be those of one rank
        free = replace(config, model=replace(config.model, tree=replace(config.model.tree, max_nodes=None)))
        return min(cost.node_parameters, _fullest_rank(free, cost_of(free), plan))
    if not plan.is_sharded:
        return cost.node_parameters
    subtrees, most = len(plan.owner_S), max(Counter(plan.owner_S).values())
    sharded = cost.node_parameters
    if plan.shard_level:
        sharded = _parameters_to(config, plan.depth) - _parameters_to(config, plan.shard_level - 1)
    return cost.node_parameters - sharded + sharded // subtrees * most


def _parameters_to(config: Config, depth: int) -> int:
    """Parameters of the model with a tree cut at a depth, gates left out."""
    tree = config.model.tree
    cut = replace(tree, depth=depth, full_depth=min(tree.deepest_full_level, depth), gate=GateName.hash)
    cost = cost_of(replace(config, model=replace(config.model, tree=cut)))
    return cost.dense_parameters + cost.node_parameters


def _sizes(data: DataConfig) -> tuple[bool, int, int, int]:
    if data.name in {DataName.parity, DataName.logic}:
        task = parity(data.num_bits) if data.name == DataName.parity else logic(data.max_length, data.max_gates)
        return False, task.input_size, task.output_size, task.max_length
    return True, 256, 256, data.context


def _dense_bytes(config: Config, cost: ModelCost) -> float:
    """Weights, gradients and Adam's moments of the dense part on one rank (Rajbhandari et al. 2020, arXiv 1910.02054)."""
    ranks, stage, number = config.cluster.num_workers, config.optim.zero_stage, cost.dense_parameters
    small = 2 if config.optim.precision == "bf16" else 4
    master = 4 if config.optim.precision == "bf16" or stage else 0
    weights = small * number / (ranks if stage == 3 else 1)
    gradients = small * number / (ranks if stage >= 2 else 1)
    return weights + gradients + (master + 8) * number / (ranks if stage >= 1 else 1)


def _count(number: int) -> str:
    """A whole number, in powers of two where its digits would say nothing."""
    return f"{number:,}" if number < 10**15 else f"about 2**{number.bit_length() - 1}"
