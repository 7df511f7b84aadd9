"""The process that writes checkpoints, without a rank: what it outlives, and how others wait for it."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distcond.train.checkpoint import newest_checkpoint
from distcond.train.sealer import ENDED, Sealer, wait_for_orphans
from distcond.train.sealing import SEAL, write_sealed
from distcond.train.snapshot import Snapshot
from tests.cluster.processes import wait_until
from tests.helpers import HANG_S, sealers_below


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    snapshot = Snapshot()
    yield snapshot
    snapshot.close()


def order(checkpoints: Path, snapshot: Snapshot, *others: str) -> dict[str, Any]:
    """To write step 4 of this rank, and to publish it with files of other ranks."""
    publication = {"name": "step_00000004", "files": ["a", *others], "state": "{}", "keep_last": 1, "keep_best": 0}
    files = snapshot.take({"a": {"value": torch.arange(10)}})
    return {"folder": str(checkpoints / ".step_4.tmp"), "files": files, "needs": "", "publication": publication}


def answer_of(sealer: Sealer) -> str:
    answer = sealer.answer(HANG_S)
    assert answer is not None
    return str(answer["error"])


def only_sealer(checkpoints: Path) -> psutil.Process:
    """The process that has answered; the one that started it may be there for another moment."""
    wait_until(lambda: len(sealers_below(checkpoints)) == 1)
    return sealers_below(checkpoints)[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_it_ends_with_its_rank_alone_and_another_takes_its_place(
    checkpoints: Path, snapshot: Snapshot, number: signal.Signals
) -> None:
    sealer = Sealer(checkpoints, snapshot.descriptor)
    sealer.give(order(checkpoints, snapshot))
    assert answer_of(sealer) == ""
    process = only_sealer(checkpoints)
    process.send_signal(number)
    if number == signal.SIGKILL:
        assert answer_of(sealer) == ENDED
    sealer.give(order(checkpoints, snapshot))
    assert answer_of(sealer) == ""
    assert (sealers_below(checkpoints) == [process]) == (number != signal.SIGKILL)
    assert newest_checkpoint(checkpoints) == (checkpoints / "step_00000004", {})
    sealer.close()
    wait_for_orphans(checkpoints)
    assert not sealers_below(checkpoints)


def test_it_needs_little_time_and_memory(checkpoints: Path, snapshot: Snapshot) -> None:
    start, sealer = time.perf_counter(), Sealer(checkpoints, snapshot.descriptor)
    sealer.start()
    started_s = time.perf_counter() - start
    sealer.give(order(checkpoints, snapshot))
    assert answer_of(sealer) == ""
    first_s = time.perf_counter() - start
    process = only_sealer(checkpoints)
    print(f"started in {started_s:.4f} s, first answer after {first_s:.3f} s, {process.memory_full_info()}")
    assert process.memory_info().rss < 40 * 2**20  # a Python without torch; with it 300 MB
    sealer.close()


def test_a_rank_that_is_started_again_waits_but_not_for_ever(checkpoints: Path, snapshot: Snapshot) -> None:
    wait_for_orphans(checkpoints)  # nobody has ever written there
    sealer = Sealer(checkpoints, snapshot.descriptor)
    sealer.give(order(checkpoints, snapshot, "b"))
    start = time.monotonic()
    wait_for_orphans(checkpoints, 0.5)
    assert time.monotonic() - start >= 0.5
    sealer.cancel()
    assert answer_of(sealer) == ""
    assert list(checkpoints.iterdir()) == []
    sealer.close()


@pytest.mark.parametrize(
    ("latest", "is_published"), [("step_00000002", True), ("step_00000004", False), ("step_00000006", False)]
)
def test_an_orphan_changes_nothing_that_the_run_has_done_since(
    checkpoints: Path, snapshot: Snapshot, latest: str, is_published: bool
) -> None:
    sealer = Sealer(checkpoints, snapshot.descriptor)
    sealer.give(order(checkpoints, snapshot, "b"))
    folder = checkpoints / ".step_4.tmp"
    while not (folder / f"a{SEAL}").exists():
        time.sleep(0.01)
    sealer.close()
    (checkpoints / latest).mkdir()
    (checkpoints / latest / "manifest.json").write_text("{}")
    (checkpoints / "latest").write_text(f"{latest}\n")
    write_sealed(folder, "b", [b"of another rank"])
    wait_for_orphans(checkpoints)
    newest, refused = newest_checkpoint(checkpoints)
    assert newest is not None and newest.name == ("step_00000004" if is_published else latest) and not refused
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted({"latest", newest.name})
    assert ("b" in json.loads((newest / "manifest.json").read_text())) == is_published
