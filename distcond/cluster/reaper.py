"""Ends at once what a killed command leaves: two of Ray's processes outlive a killed driver by a minute, others by seconds.

Run as a file, without this package: it waits for its standard input to end. A command that ends as it should says so first.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

GOOD_END = b"end"


@contextlib.contextmanager
def reaped(processes: list[int]) -> Iterator[None]:
    """While inside, these processes, by number, are killed as soon as this one is killed. Linux only; elsewhere nothing."""
    if not sys.platform.startswith("linux"):
        yield
        return
    known = [f"{process}:{_start_time(process)}" for process in processes]
    reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *known],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # who kills a process group, or closes a terminal, does not mean it
    )
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            reaper.communicate(GOOD_END)


def _start_time(process: int) -> str:
    """By which a process is told from a later one of the same number; empty if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _wait_and_reap(known: list[str]) -> None:
    if sys.stdin.buffer.read() == GOOD_END:
        return
    for process, _, start_time in (each.partition(":") for each in known):
        if start_time and _start_time(int(process)) == start_time:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


if __name__ == "__main__":
    _wait_and_reap(sys.argv[1:])
