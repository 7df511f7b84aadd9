"""What a run would be, without starting it: parameters, computation, placement, memory."""

from collections import Counter
from dataclasses import replace

from distcond.config import Config, GateName, HaltingKind
from distcond.config.cost import ModelCost
from distcond.table import SubtreePlan
from distcond.train.fits import BYTES_PER_ROW_NUMBER, cost_of, dense_bytes
from distcond.train.pace import seconds_per_step


def describe(config: Config) -> str:
    """Parameters, MACs, sharding plan and bytes per rank of a run; the corpus is not opened."""
    cost = cost_of(config)
    halting, tree, cluster = config.model.halting, config.model.tree, config.cluster
    most = 1 if halting.kind == HaltingKind.none else halting.max_steps
    lines = [
        f"dense parameters    {cost.dense_parameters:,}",
        f"node parameters     {_count(cost.node_parameters)} if every node comes to exist{_limit(config)}",
        f"MACs per position   {cost.macs(1):,.0f} with 1 ponder step, {cost.macs(most):,.0f} with {most}",
        f"ranks               {cluster.num_workers}, ZeRO {config.optim.zero_stage}, {config.optim.precision}",
        f"memory per rank     {dense_bytes(config, cost) / 2**20:,.1f} MiB for the dense part",
    ]
    size = cluster.expert_parallel_size or cluster.num_workers
    if cost.node_parameters and not config.model.is_shipped:
        lines.append(f"sharding plan       subtrees of the model's own trees over {size} ranks")
    elif cost.node_parameters:
        plan = SubtreePlan.make(tree.depth, size, cluster.shard_level, tree.num_trees)
        shared = f"levels 0 to {plan.shard_level - 1} on every rank, " if plan.shard_level else ""
        subtrees = f"{shared}{len(plan.owner_S)} subtrees over {size} ranks"
        where = subtrees if plan.is_sharded else "every rank holds every node"
        rows = _count(BYTES_PER_ROW_NUMBER * _fullest_rank(config, cost, plan))
        lines += [f"sharding plan       {where}", f"                    up to {rows} bytes of rows per rank"]
    return "\n".join([*lines, f"a crash costs       {_at_risk(config)}"])


def _at_risk(config: Config) -> str:
    """What a crash can make a run do again: all since the last checkpoint."""
    steps, pace = min(config.checkpoint.every, config.train.max_steps), seconds_per_step(config)
    what = f"up to {steps:,} step{'s' * (steps > 1)} (checkpoint.every={config.checkpoint.every})"
    if pace is None:
        return f"{what}; how long one takes, its metrics will say"
    seconds, source = pace
    return f"{what}, about {steps * seconds:.3g} s of work at {seconds:.2g} s a step ({source})"


def _limit(config: Config) -> str:
    most = config.model.tree.max_nodes
    return "" if most is None else f", of at most {most:,}"


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


def _count(number: int) -> str:
    """A whole number, in powers of two where its digits would say nothing."""
    return f"{number:,}" if number < 10**15 else f"about 2**{number.bit_length() - 1}"
