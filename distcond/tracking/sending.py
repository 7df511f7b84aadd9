"""Sends to a wandb server what it has not got yet of a run folder: `distcond sync`."""

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distcond.errors import RunError
from distcond.tracking import child
from distcond.tracking.identity import WandbRun, last_sent, server
from distcond.tracking.mirror import BUSY, FINISH_TIMEOUT_S, INIT_TIMEOUT_S, NO_KEY
from distcond.tracking.tracker import METRICS, what_of

START_TIMEOUT_S = 2.0 * INIT_TIMEOUT_S
"The longest until a server has answered; wandb takes some seconds to be imported."
SECONDS_PER_ROW = 0.01
"That a slow connection may take."


class SendError(Exception):
    """A server that cannot be reached or refuses; the message is one line."""


class NoKeyError(SendError):
    """No wandb key for this server."""


def has_unsent(folder: Path, *, is_growing: bool) -> bool:
    """Whether there are rows that the server has not got. is_growing: the last step may still get more rows, and has to wait."""
    return last_sent(folder) < _until(folder, is_growing)


def send(folder: Path, run: WandbRun, *, is_growing: bool) -> int | None:
    """Send the rows and samples that the server has not got; returns how many rows. None: its own mirror is about to.

    Raises SendError where that does not come to an end in time, and then nothing counts as sent.
    """
    until = _until(folder, is_growing)
    process = child.start(folder, {"what": "send", "until": until, **what_of(folder, run)})
    assert process.stdin is not None and process.stdout is not None
    answers: dict[str, Any] = {}
    started = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                answers.update(json.loads(line))
                started.set()
                if answers.keys() & {"sent", "error"}:
                    break
        started.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        limit = FINISH_TIMEOUT_S + START_TIMEOUT_S + SECONDS_PER_ROW * sum(1 for _ in _steps(folder))
        if started.wait(START_TIMEOUT_S):
            listener.join(limit)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has answered, or does not: wandb's own good-bye takes its time
            os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        process.wait()
    error = answers.get("error", "" if "sent" in answers else f"no answer within {START_TIMEOUT_S:g} s")
    if error == BUSY:
        return None
    if error == NO_KEY:
        raise NoKeyError(f"there is no wandb key for {server()}; set WANDB_API_KEY or run `wandb login`, and WANDB_BASE_URL.")
    if error:
        raise SendError(
            f"{folder} could not be sent to {server()} ({error}); nothing counts as sent, see {folder}/logs/wandb.log."
        )
    return int(answers["sent"])


def _until(folder: Path, is_growing: bool) -> float:
    """The last step that may be sent."""
    steps = sorted(set(_steps(folder)))[-2 if is_growing else -1 :]
    return -math.inf if not steps or (is_growing and len(steps) < 2) else steps[0]


def _steps(folder: Path) -> Iterator[int]:
    """Of each complete row."""
    file = folder / METRICS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    for place, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                yield int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(
                    f"{file}, line {place}, is damaged (it is no JSON object with a step); remove that line."
                ) from error
