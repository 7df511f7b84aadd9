import re

import pytest

from distcond.cluster.policy import (
    LESS_MEMORY,
    LOST,
    OUT_OF_MEMORY,
    SILENT,
    STUCK,
    Ask,
    Room,
    ask_of,
    check_room,
    culprits,
    failure_line,
    num_runs_at_once,
    restart_line,
    should_restart,
    threads_per_worker,
    waiting_line,
)
from distcond.config import ClusterConfig
from distcond.errors import ClusterError

TWO_CORES = Room(cpus=2, gpus=0)
EIGHT_GPUS = Room(cpus=64, gpus=8, place="the cluster at host:6379")


@pytest.mark.parametrize(
    ("ask", "room"),
    [
        (Ask(2, 1, 0), TWO_CORES),
        (Ask(1, 2, 0), TWO_CORES),
        (Ask(3, 2 / 3, 0), TWO_CORES),
        (Ask(20, 0.1, 0), TWO_CORES),  # 20 x 0.1 is a little more than 2 in floating point
        (Ask(8, 8, 1), EIGHT_GPUS),
        (Ask(1, 1, 0.5), EIGHT_GPUS),
    ],
)
def test_what_fits_is_let_through(ask: Ask, room: Room) -> None:
    check_room(ask, room)
    assert num_runs_at_once(ask, room) >= 1
    assert waiting_line(ask, room) == ""


def test_a_cluster_that_has_lost_nodes_is_waited_for_in_a_line_with_both_numbers() -> None:
    line = "Waiting: cluster.num_workers=2 x 1 CPU asks for 2 CPUs; the cluster has 1."
    assert waiting_line(Ask(2, 1, 0), Room(1, 0, "the cluster")) == line
    line = "Waiting: cluster.num_workers=8 x 1 GPU asks for 8 GPUs; the cluster has 4."
    assert waiting_line(Ask(8, 4, 1), Room(32, 4, "the cluster")) == line


@pytest.mark.parametrize(
    ("ask", "room", "message"),
    [
        (
            Ask(64, 1, 0),
            TWO_CORES,
            "cluster.num_workers=64 x 1 CPU asks for 64 CPUs; this machine has 2: use cluster.num_workers=2 or "
            "cluster.cpus_per_worker=0.03.",
        ),
        (
            Ask(2, 1.5, 0),
            TWO_CORES,
            "cluster.num_workers=2 x 1.5 CPU asks for 3 CPUs; this machine has 2: use cluster.num_workers=1 or "
            "cluster.cpus_per_worker=1.",
        ),
        (
            Ask(1, 4, 0),
            TWO_CORES,
            "cluster.num_workers=1 x 4 CPU asks for 4 CPUs; this machine has 2: use cluster.cpus_per_worker=2.",
        ),
        (
            Ask(1000, 1, 0),
            TWO_CORES,
            "cluster.num_workers=1000 x 1 CPU asks for 1000 CPUs; this machine has 2: use cluster.num_workers=2.",
        ),
        (
            Ask(16, 1, 1),
            EIGHT_GPUS,
            "cluster.num_workers=16 x 1 GPU asks for 16 GPUs; the cluster at host:6379 has 8: use cluster.num_workers=8.",
        ),
        (
            Ask(1, 1, 1),
            TWO_CORES,
            "cluster.num_workers=1 x 1 GPU asks for 1 GPUs; this machine has 0: use cluster.gpus_per_worker=0.",
        ),
        (
            Ask(2, 1, 0.5),
            EIGHT_GPUS,
            "cluster.gpus_per_worker=0.5 puts several ranks on one GPU, which their collectives (NCCL) refuse; use "
            "cluster.gpus_per_worker=1.",
        ),
    ],
)
def test_a_refusal_names_both_numbers_and_what_to_do(ask: Ask, room: Room, message: str) -> None:
    with pytest.raises(ClusterError, match=f"^{re.escape(message)}$"):
        check_room(ask, room)


@pytest.mark.parametrize("num_workers", [3, 7, 64, 199])
@pytest.mark.parametrize("cpus", [0.7, 1, 3])
def test_the_advice_fits(num_workers: int, cpus: float) -> None:
    with pytest.raises(ClusterError) as refusal:
        check_room(Ask(num_workers, cpus, 0), TWO_CORES)
    advice = dict(re.findall(r"cluster\.(\w+)=([\d.]+\d)", str(refusal.value).partition(": use ")[2]))
    assert advice
    for workers, share in (
        (int(advice.get("num_workers", 1)), cpus if "num_workers" in advice else 1),
        (num_workers, float(advice.get("cpus_per_worker", 0.001))),
    ):
        check_room(Ask(workers, share, 0), TWO_CORES)


@pytest.mark.parametrize(
    ("ask", "room", "runs"),
    [
        (Ask(2, 1, 0), TWO_CORES, 1),
        (Ask(2, 0.5, 0), TWO_CORES, 2),
        (Ask(10, 0.1, 0), TWO_CORES, 2),
        (Ask(3, 1, 0), TWO_CORES, 0),
        (Ask(2, 1, 1), EIGHT_GPUS, 4),
        (Ask(2, 16, 1), EIGHT_GPUS, 2),
    ],
)
def test_runs_side_by_side_never_ask_for_more_than_there_is(ask: Ask, room: Room, runs: int) -> None:
    assert num_runs_at_once(ask, room) == runs


def test_an_ask_is_what_the_configuration_says() -> None:
    ask = ask_of(ClusterConfig(num_workers=4, cpus_per_worker=0.5, gpus_per_worker=1))
    assert ask == Ask(4, 0.5, 1)
    assert ask.bundle == {"CPU": 0.5, "GPU": 1}
    assert Ask(4, 0.5, 0).bundle == {"CPU": 0.5}


@pytest.mark.parametrize(("cpus", "threads"), [(0.1, 1), (1, 1), (1.9, 1), (2, 2), (8, 8)])
def test_a_worker_computes_with_the_whole_cores_it_reserved(cpus: float, threads: int) -> None:
    assert threads_per_worker(Ask(2, cpus, 0)) == threads


SHORT, SHORT_ELSEWHERE = f"{OUT_OF_MEMORY}: 8 bytes asked for in a.py:1", f"{OUT_OF_MEMORY}: 9 bytes asked for in b.py:2"
NAN = {0: "ValueError: nan", 1: "RuntimeError: connection closed"}


@pytest.mark.parametrize(
    ("failures", "before", "has_progressed", "count", "allowed", "expected"),
    [
        ({3: LOST}, None, False, 1, 3, True),
        ({3: LOST}, {3: LOST}, False, 3, 3, True),  # bad luck twice
        ({3: LOST}, {3: LOST}, True, 4, 3, False),  # once too often
        ({3: LOST}, None, True, 1, 0, False),
        (NAN, None, False, 1, 3, True),  # may be bad luck
        (NAN, NAN, False, 2, 3, False),  # is none
        (NAN, NAN, True, 2, 3, True),
        (NAN, {0: "OSError: disk"}, False, 2, 3, True),
        ({3: SILENT}, {3: SILENT}, False, 3, 3, True),
        ({1: SHORT}, None, False, 1, 3, True),  # something else may have taken the memory for a while
        ({1: SHORT}, {0: SHORT_ELSEWHERE, 1: LOST}, False, 2, 3, False),  # there is too little, wherever it is asked for
        ({0: LOST, 1: SHORT}, {1: SHORT_ELSEWHERE}, False, 2, 3, False),
        ({1: SHORT}, {1: SHORT}, True, 2, 3, True),
        ({1: SHORT}, {1: SHORT}, True, 4, 3, False),  # never without end
        ({}, None, False, 1, 3, True),
        ({}, {}, False, 2, 3, False),  # the workers did not even start, twice
    ],
)
def test_workers_are_started_again_where_it_may_help(
    failures: dict[int, str], before: dict[int, str] | None, has_progressed: bool, count: int, allowed: int, expected: bool
) -> None:
    assert should_restart(failures, before, has_progressed, count, allowed) is expected


@pytest.mark.parametrize(
    ("failures", "what"),
    [
        ({3: LOST}, "worker 3 lost"),
        ({0: "RuntimeError: connection closed by peer", 3: LOST}, "worker 3 lost"),
        ({5: LOST, 4: LOST}, "worker 4, 5 lost"),
        ({0: LOST, 1: SILENT}, "worker 1 did not answer"),
        ({0: f"{STUCK}: why", 1: f"{STUCK}: why"}, "worker 0, 1 stood still: why"),
        ({0: LOST, 1: SHORT}, f"worker 1 {SHORT}; {LESS_MEMORY}"),
        (NAN, "worker 0 failed: ValueError: nan"),
        ({}, "the workers could not be started"),
    ],
)
def test_a_failure_is_told_by_its_cause(failures: dict[int, str], what: str) -> None:
    assert failure_line(failures) == what
    assert restart_line(failures, 1, 3) == f"Restarting: {what} (failure 1 of 3 allowed)."


def test_the_log_to_read_is_that_of_the_cause() -> None:
    assert culprits({2: "ValueError: nan", 1: "RuntimeError: closed"}) == [1]
    assert culprits({0: "RuntimeError: closed", 2: LOST, 1: LOST}) == [1, 2]
