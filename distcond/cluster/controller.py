"""The actor that starts, watches and restarts the workers of a run, by Ray Train, and how to start it.

Light to import: Ray Train itself (`ray_train.py`) is imported in the actor alone, for it takes a second.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from distcond.cluster.policy import Ask
from distcond.errors import TrainingError, UserError


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the controller is to run. It travels to other processes, so everything in it can be pickled."""

    train: Callable[[], dict[str, Any]]
    "The training function of every rank; returns the summary."
    join: Callable[[str, int, Path], None]
    "Called on every rank before it, with address and port of rank 0, and a file that is not there yet."
    ask: Ask
    max_failures: int
    hang_timeout_s: float
    "How long a worker may leave a question unanswered."
    wait_for_ranks: Callable[[], None]
    "Returns when no worker of an earlier start writes any more; raises a UserError if that does not come."
    logs: Path
    "Absolute folder for Ray Train's own files."
    started_file: Path
    "Exists while there is something to lose: from when the ranks enter the training loop."
    restarts_file: Path
    "Gets a line for the user at each restart of the workers, and where they wait for lost nodes."
    metrics: Path
    "Absolute path of the metrics; what a restart has not made grow, it has not helped."


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How it ended: with a summary, or with failures."""

    summary: dict[str, Any] = field(default_factory=dict)
    "What rank 0 returned."
    last_word: UserError | TrainingError | None = None
    "What a rank found that no other attempt would change."
    failures: Mapping[int, str] = field(default_factory=dict)
    "Rank -> what happened to it, in one line."
    error: str = ""
    "What Ray Train says; empty where all went well."


def start_controller(job: Job) -> tuple[Any, Any]:
    """Start the controller on this node: its actor, and the future of its `Outcome`."""
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    actor = ray.remote(_Controller).options(num_cpus=0, label_selector=here).remote()
    return actor, actor.run.remote(job)


class _Controller:
    def run(self, job: Job) -> Outcome:
        from distcond.cluster.ray_train import run_workers

        return run_workers(job)
