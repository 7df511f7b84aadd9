"""Notices a rank whose training stands still while its process answers: an endless loop, a collective that waits for ever."""

import faulthandler
import threading
import time
from collections.abc import Callable

from distcond.cluster.policy import STUCK
from distcond.data.batches import Batch, Feeder

LOOKS_PER_TIMEOUT = 50
OTHERS_S = 1.0
"For the other ranks to write where they stand, before all are ended."


class StuckError(RuntimeError):
    """A rank that asked for no batch for too long."""


class Pulse:
    """A feeder that passes batches on, and tells when none was asked for during `timeout_s`.

    Time counts from the first batch: what comes before is start-up. It runs while a batch is waited for, too.
    """

    def __init__(self, feeder: Feeder, timeout_s: float, tell: Callable[[StuckError], None]) -> None:
        self._feeder, self._timeout_s, self._tell = feeder, timeout_s, tell
        self._beat = 0.0
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="pulse", daemon=True)

    def get(self, step: int, micro: int) -> Batch:
        """The feeder's."""
        self._note()
        return self._feeder.get(step, micro)

    def validation(self, index: int) -> Batch:
        """The feeder's."""
        self._note()
        return self._feeder.validation(index)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _note(self) -> None:
        self._beat = time.monotonic()
        if self._watcher.ident is None:
            self._watcher.start()

    def _watch(self) -> None:
        while not self._closed.wait(self._timeout_s / LOOKS_PER_TIMEOUT):
            if time.monotonic() - self._beat > self._timeout_s:
                faulthandler.dump_traceback(all_threads=True)  # into the rank's log: where it stands
                self._closed.wait(OTHERS_S)
                self._tell(StuckError(f"{STUCK}: no batch asked for in {self._timeout_s:g} s"))
                return
