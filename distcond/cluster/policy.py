"""What a run asks of a machine or cluster, what there is, and what follows: go ahead, or a refusal that names both numbers.

Pure: no Ray, no torch, no clock, no files, so that every decision can be read and tested as a table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distcond.config import ClusterConfig
from distcond.errors import ClusterError

LOST = "lost"
"What is said of a worker whose process or node is gone."
SILENT = "did not answer"
"What is said of a worker that was asked for cluster.hang_timeout_s in vain, and was killed therefore."
STUCK = "stood still"
"How what is said of a worker begins that answers, but trains no more."
OUT_OF_MEMORY = "ran out of memory"
"How what is said of a worker begins that could not allocate, or was killed for want of memory."
KINDS = (OUT_OF_MEMORY, SILENT, LOST, STUCK)
"What else than an error of its own may be said of a worker; the first one that is said of any is the cause."
LESS_MEMORY = (
    "lower data.global_batch_size, data.context, model.width or model.tree.max_nodes, or raise optim.accumulation or "
    "optim.zero_stage"
)
ROUNDING = 1e-4
"Ray counts resources in units of this size."


@dataclass(frozen=True, slots=True)
class Room:
    """What a machine or cluster has in all."""

    cpus: float
    gpus: float
    place: str = "this machine"

    @classmethod
    def of(cls, resources: Mapping[str, float], place: str) -> "Room":
        """That of a cluster, by what Ray says of it."""
        return cls(resources.get("CPU", 0), resources.get("GPU", 0), place)


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
    for line, resource, per_worker, available in _shortages(ask, room):
        raise ClusterError(f"{line}: use {_advice(resource, ask.num_workers, per_worker, available)}.")


def waiting_line(ask: Ask, room: Room) -> str:
    """What to tell the user where a cluster has lost room and a run waits for its return; empty: there is room."""
    return next((f"Waiting: {line}." for line, *_ in _shortages(ask, room)), "")


def _shortages(ask: Ask, room: Room) -> Iterator[tuple[str, str, float, float]]:
    """What there is too little of: both numbers in a line, the resource, what a worker asks for, what there is in all."""
    for resource, per_worker, available in (
        ("CPU", ask.cpus_per_worker, room.cpus),
        ("GPU", ask.gpus_per_worker, room.gpus),
    ):
        asked = ask.num_workers * per_worker
        if asked > available + ROUNDING * ask.num_workers:
            line = f"cluster.num_workers={ask.num_workers} x {per_worker:g} {resource} asks for {asked:g} {resource}s"
            yield f"{line}; {room.place} has {available:g}", resource, per_worker, available


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
    only repeat it. Nor is memory, even if its place or amount differ.
    """
    is_bad_luck = not {LOST, SILENT}.isdisjoint(failures.values())
    is_short_again = all(_of_kind(each or {}, OUT_OF_MEMORY) for each in (failures, before))
    is_repeated = not has_progressed and (is_short_again or (failures == before and not is_bad_luck))
    return count <= allowed and not is_repeated


def restart_line(failures: Mapping[int, str], count: int, allowed: int) -> str:
    """What to tell the user about a restart after the `count`-th failure."""
    return f"Restarting: {failure_line(failures)} (failure {count} of {allowed} allowed)."


def failure_line(failures: Mapping[int, str]) -> str:
    """The failure of `culprits`, in words."""
    if not failures:
        return "the workers could not be started"
    ranks = culprits(failures)
    reason = failures[ranks[0]]
    kind = _kind(reason)
    what = reason if kind else f"failed: {reason}"
    return f"worker {', '.join(map(str, ranks))} {what}" + (f"; {LESS_MEMORY}" if kind == OUT_OF_MEMORY else "")


def culprits(failures: Mapping[int, str]) -> list[int]:
    """The ranks for want of which the others fail: those of the first of KINDS that there is, else the lowest one."""
    for kind in KINDS:
        if ranks := _of_kind(failures, kind):
            return ranks
    return [min(failures)]


def _kind(reason: str) -> str:
    """Which of KINDS; empty: an error of the worker's own."""
    return next((kind for kind in KINDS if reason.startswith(kind)), "")


def _of_kind(failures: Mapping[int, str], kind: str) -> list[int]:
    return sorted(rank for rank, reason in failures.items() if _kind(reason) == kind)


def _advice(resource: str, num_workers: int, per_worker: float, available: float) -> str:
    fits = int((available + ROUNDING) // per_worker)
    fewer = [f"cluster.num_workers={fits}"] if fits else []
    share = int(100 * available / num_workers) / 100
    if resource == "GPU":
        return " or ".join(fewer) or "cluster.gpus_per_worker=0"
    return " or ".join([*fewer, *([f"cluster.cpus_per_worker={share:g}"] if share else [])])
