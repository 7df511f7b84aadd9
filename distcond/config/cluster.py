"""Configuration of where a run runs, and of searches over runs."""

from dataclasses import dataclass, field
from typing import Any

from distcond.config.check import need
from distcond.config.choices import ClusterName, Kernels, Search

MOST_WORKERS = 2**16


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where a run runs and how node tables are spread over its ranks."""

    name: ClusterName = ClusterName.local
    "local: a Ray started for this run. ray: a running cluster. slurm: a batch script. kuberay: a RayJob on Kubernetes."
    address: str = ""
    "ray: address of the cluster: its dashboard for submit (http://host:8265). Empty: RAY_ADDRESS."
    num_workers: int = 2
    "Ranks; >= 1."
    cpus_per_worker: float = 1.0
    "CPU cores reserved per rank; > 0."
    gpus_per_worker: float = 0.0
    "GPUs reserved per rank; >= 0."
    expert_parallel_size: int | None = None
    "E, the ranks that share one copy of a node table; divides num_workers; null: all of them."
    shard_level: int | None = None
    "s: levels above s are replicated, a subtree below is on one rank; null: least s with num_trees 2**s >= 4 E. Placement only."
    rebalance_every: int | None = None
    "Steps after which subtrees move between ranks so that these serve equally many tokens; >= 1; null: never. Placement only."
    kernels: Kernels = Kernels.torch
    "torch: plain torch, everywhere. native: fp32 trees and recurrent cells on CPUs by C, compiled once by gcc."
    max_failures: int = 3
    "Restarts of the workers after a crash before the run gives up; >= 0."
    hang_timeout_s: float = 600.0
    "Seconds without a sign of life, or from one batch to the next, after which workers are restarted; above the longest step, "
    "compilation and checkpoint; > 0."
    partition: str = ""
    "slurm: partition; empty: the cluster's default."
    time_limit: str = "04:00:00"
    "slurm, kuberay: wall-clock limit, HH:MM:SS or D-HH:MM:SS."
    image: str = "distcond:0.1.0"
    "kuberay: image of every pod, built from docker/."
    namespace: str = "default"
    "kuberay: where the pods are."
    storage_claim: str = ""
    "kuberay: PersistentVolumeClaim that all pods mount at run.dir."
    env_from: str = ""
    "kuberay: Secret whose entries become environment variables of the pods, e.g. WANDB_API_KEY; empty: none."
    memory_gib_per_worker: float = 8.0
    "kuberay: memory of a rank's pod beside Ray's object store; > 0."

    def __post_init__(self) -> None:
        need(1 <= self.num_workers <= MOST_WORKERS, f"cluster.num_workers={self.num_workers} is outside 1..{MOST_WORKERS}.")
        need(self.cpus_per_worker > 0, f"cluster.cpus_per_worker={self.cpus_per_worker} is not positive.")
        need(self.gpus_per_worker >= 0, f"cluster.gpus_per_worker={self.gpus_per_worker} is negative.")
        memory = self.memory_gib_per_worker
        need(memory > 0, f"cluster.memory_gib_per_worker={memory} is not positive; e.g. 8.")
        need(self.max_failures >= 0, f"cluster.max_failures={self.max_failures} is negative; use 0 or more.")
        need(self.hang_timeout_s > 0, f"cluster.hang_timeout_s={self.hang_timeout_s} is not positive; use seconds, e.g. 600.")
        size = self.expert_parallel_size
        need(
            size is None or (size >= 1 and self.num_workers % size == 0),
            f"cluster.expert_parallel_size={size} does not divide cluster.num_workers={self.num_workers}.",
        )
        level = self.shard_level
        every = self.rebalance_every
        need(every is None or every >= 1, f"cluster.rebalance_every={every} is below 1; use 1 or more, or null for never.")
        need(level is None or 0 <= level <= 20, f"cluster.shard_level={level} is outside 0..20.")


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """A search over overrides of the run, by Ray Tune."""

    name: str = ""
    "Name of the sweep's folder under run.dir; empty: made from the time."
    space: dict[str, Any] = field(default_factory=dict)
    "Dotted key -> list (grid), {min, max, scale: linear|log} (range) or {choice: list} (one of them a sample)."
    search: Search = Search.random
    """random: all combinations of the lists, with samples of ranges and choices. optuna: one value of every key a trial, by
    what came of those before."""
    num_samples: int = 1
    "random: samples of the ranges and choices, each crossed with the whole grid. optuna: trials. >= 1."
    asha_grace: float = 0.25
    "Share of train.max_steps that every trial gets before ASHA may stop it; in (0, 1]."
    asha_reduction: int = 2
    "Of the trials at a rung, one in this many goes on; >= 2."
    max_concurrent: int | None = None
    "Trials at once; null: as many as the cluster has room for."

    def __post_init__(self) -> None:
        need(self.num_samples >= 1, f"sweep.num_samples={self.num_samples} is below 1; use 1 or more.")
        need(0 < self.asha_grace <= 1, f"sweep.asha_grace={self.asha_grace} is outside (0, 1].")
        need(self.asha_reduction >= 2, f"sweep.asha_reduction={self.asha_reduction} is below 2; use 2 or more.")
