"""What a run asks of a machine or cluster, what there is, and what follows: go ahead, or a refusal that names both numbers.

Pure: no Ray, no torch, no clock, no files, so that every decision can be read and tested as a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distcond.config import ClusterConfig
from distcond.errors import ClusterError

LOST = "lost"
"What is said of a worker whose process or node is gone; anything else is an error that the worker itself raised."
ROUNDING = 1e-4
"Ray counts resources in units of this size."


@dataclass(frozen=True, slots=True)
class Room:
    """What a machine or cluster has in all."""

    cpus: float
    gpus: float
    place: str = "this machine"


@dataclass(frozen=True, slots=True)
class Ask:
    """What one run reserves: `num_workers` times the same bundle."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def bundle(self) -> dict[str, float]:
        """Ray resources of one worker."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}


def ask_of(cluster: ClusterConfig) -> Ask:
    """What a run with this configuration reserves."""
    return Ask(cluster.num_workers, cluster.cpus_per_worker, cluster.gpus_per_worker)


def check_room(ask: Ask, room: Room) -> None:
    """Raise ClusterError, naming both numbers and what to do, where `ask` can never fit into `room`."""
    if ask.num_workers > 1 and 0 < ask.gpus_per_worker < 1:
        raise ClusterError(
            f"cluster.gpus_per_worker={ask.gpus_per_worker:g} puts several ranks on one GPU, which their collectives (NCCL) "
            "refuse; use cluster.gpus_per_worker=1."
        )
    for resource, per_worker, available in (
        ("CPU", ask.cpus_per_worker, room.cpus),
        ("GPU", ask.gpus_per_worker, room.gpus),
    ):
        asked = ask.num_workers * per_worker
        if asked <= available + ROUNDING * ask.num_workers:
            continue
        raise ClusterError(
            f"cluster.num_workers={ask.num_workers} x {per_worker:g} {resource} asks for {asked:g} {resource}s; {room.place} "
            f"has {available:g}: use {_advice(resource, ask.num_workers, per_worker, available)}."
        )


def num_runs_at_once(ask: Ask, room: Room) -> int:
    """How many runs of this size fit side by side; 0 where none does."""
    pairs = ((ask.cpus_per_worker, room.cpus), (ask.gpus_per_worker, room.gpus))
    return min(int((have + ROUNDING) // (ask.num_workers * need)) for need, have in pairs if need > 0)


def threads_per_worker(ask: Ask) -> int:
    """Arithmetic threads of one worker: the whole cores it reserved, at least one."""
    return max(1, int(ask.cpus_per_worker))


def should_restart(
    failures: Mapping[int, str], before: Mapping[int, str] | None, has_progressed: bool, count: int, allowed: int
) -> bool:
    """Whether to start the workers again after their `count`-th failure.

    failures, before: rank -> what happened, now and at the previous failure, if there was one; empty where the workers did
    not even start. An error that comes back before anything was achieved in between is not bad luck: one more attempt would
    only repeat it.
    """
    is_repeated = failures == before and not has_progressed and LOST not in failures.values()
    return count <= allowed and not is_repeated


def restart_line(failures: Mapping[int, str], count: int, allowed: int) -> str:
    """What to tell the user about a restart after the `count`-th failure."""
    lost = [rank for rank, reason in failures.items() if reason == LOST]
    # NOTE: when a worker is lost, the others fail too, for want of it; the cause is the lost one.
    what = f"worker {_join(lost)} lost" if lost else failure_line(failures)
    return f"Restarting: {what} (failure {count} of {allowed} allowed)."


def failure_line(failures: Mapping[int, str]) -> str:
    """The failure of the lowest rank, in words."""
    if not failures:
        return "the workers could not be started"
    rank = min(failures)
    return f"worker {rank} {LOST}" if failures[rank] == LOST else f"worker {rank} failed: {failures[rank]}"


def _advice(resource: str, num_workers: int, per_worker: float, available: float) -> str:
    fits = int((available + ROUNDING) // per_worker)
    fewer = [f"cluster.num_workers={fits}"] if fits else []
    share = int(100 * available / num_workers) / 100
    if resource == "GPU":
        return " or ".join(fewer) or "cluster.gpus_per_worker=0"
    return " or ".join([*fewer, *([f"cluster.cpus_per_worker={share:g}"] if share else [])])


def _join(ranks: list[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
