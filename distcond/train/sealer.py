"""The process that writes a rank's checkpoints (sealing.py), as the rank sees it; and how to wait for those of killed ranks."""

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from distcond.train import sealing

ENDED = "the process that was writing it has ended"
LOCK = "checkpoints.lock"
"A file beside the checkpoints, locked by every such process as long as it lives."
ORPHANS_S, POLL_S = 60.0, 0.02
"The longest that processes of killed ranks are waited for."


class Sealer:
    """The process: one at a time, started again where it has ended.

    memory: descriptor of the memory that it writes from.
    """

    def __init__(self, checkpoints: Path, memory: int) -> None:
        self._checkpoints, self._memory = checkpoints, memory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Have a process that lives. Raises OSError."""
        if self._process is not None and self.answer() is None:
            self._process.poll()  # NOTE: the first of two processes, which has ended, see sealing.py
            return
        self.close()
        # NOTE: the rank locks, so that there is no moment at which an order has been given and nothing is locked.
        lock = os.open(self._checkpoints.with_name(LOCK), os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):  # storage that knows no locks
                fcntl.flock(lock, fcntl.LOCK_SH)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", sealing.__file__, str(self._memory), str(self._checkpoints)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=(self._memory, lock),
                start_new_session=True,  # who kills a process group, or closes a terminal, does not mean it
            )
        finally:
            os.close(lock)

    def give(self, order: dict[str, Any]) -> None:
        """Give an order, which is carried out from then on whatever becomes of this rank. Raises OSError."""
        self.start()
        self._tell(json.dumps(order).encode() + b"\n")

    def cancel(self) -> None:
        """Take the last order back, if it can still be taken back."""
        self._tell(sealing.CANCEL)

    def answer(self, timeout_s: float = 0.0) -> dict[str, Any] | None:
        """How the last order ended: its `error`, "" for none, and `seconds`; None if nothing is known within the time."""
        assert self._process is not None and self._process.stdout is not None
        output = select.poll()  # NOTE: select.select knows no descriptors above 1023
        output.register(self._process.stdout)
        if not output.poll(1000 * timeout_s):
            return None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"error": ENDED, "seconds": 0.0}
        return answer

    def close(self) -> None:
        """Let it end, after what it has been given."""
        if self._process is not None:
            with self._process:  # NOTE: which closes the pipes, and waits for the first process
                self._process = None

    def _tell(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as its answer will be
            while line:
                line = line[self._process.stdin.write(line) :]


def wait_for_orphans(checkpoints: Path, timeout_s: float = ORPHANS_S) -> None:
    """Wait, but not for ever, until no process writes checkpoints any more that its rank, which was killed, gave it."""
    end = time.monotonic() + timeout_s
    with contextlib.suppress(OSError), checkpoints.with_name(LOCK).open("r+") as lock:  # none was there, or no locks are known
        while time.monotonic() < end:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(POLL_S)
