"""What a user's signals ask of a run: how many came, and the end of all that was started."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import psutil

STATUS_INTERRUPTED = 130
"Exit status after Ctrl-C, as shells have it."
ECHO_S = 2.0
"SIGTERMs this close are one: `timeout` and others signal a command and then its process group, which it is in."


@contextmanager
def counted_signals() -> Iterator[Callable[[], int]]:
    """Catches SIGINT and SIGTERM; yields a function that says how many there were.

    NOTE: it has to be called often, for Ray puts a handler of its own in place once it has started.
    """
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    count, last = 0, {int(number): -ECHO_S for number in numbers}

    def hear(number: int, frame: object) -> None:
        nonlocal count
        now = time.monotonic()
        count += number == signal.SIGINT or now - last[number] >= ECHO_S
        last[number] = now

    def listen() -> int:
        for number in numbers:
            signal.signal(number, hear)
        return count

    try:
        listen()
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once() -> NoReturn:
    """Kill all that this process has started, then the process, which may be inside of Ray and unable to end itself."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(STATUS_INTERRUPTED)
