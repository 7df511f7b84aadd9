"""The process that talks to wandb, as whoever starts it sees it."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from distcond.redaction import without_user
from distcond.tracking import mirror


def start(folder: Path, task: dict[str, Any]) -> "subprocess.Popen[bytes]":
    """A process that does `task`, see mirror.py; what wandb says goes to RUN/logs/wandb.log."""
    # NOTE: wandb looks for its error reporting even offline; an offline run must not touch the network.
    environment = {"WANDB_ERROR_REPORTING": "false", **os.environ}
    environment.pop("WANDB_SERVICE", None)  # another wandb of this process
    if "WANDB_BASE_URL" in environment:  # wandb logs it, and gives its key, not a user and password, to the server
        environment["WANDB_BASE_URL"] = without_user(environment["WANDB_BASE_URL"])
    (folder / "logs").mkdir(exist_ok=True)
    with (folder / "logs" / "wandb.log").open("ab") as chatter:
        process = subprocess.Popen(
            [sys.executable, "-P", mirror.__file__],  # a file, not a module: a Ray worker's sys.path is not its child's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=chatter,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the run; the mirror still has its last rows to copy
        )
    tell(process, json.dumps(task).encode() + b"\n")
    return process


def tell(process: "subprocess.Popen[bytes]", message: bytes) -> None:
    """Send it some words. One that has died has said why."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(message)
        process.stdin.flush()
