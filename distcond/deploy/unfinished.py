"""A folder that is there whole or not at all, and what a killed process left of one."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".export"


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, to be filled: it becomes `out`, or is removed where an error ends the filling.

    A lock on it dies with its process. Folders beside it that nobody holds, as a killed process leaves them, are removed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".*{SUFFIX}"):
        with contextlib.suppress(OSError), _held(left):  # another process is filling it, or removes it, too
            shutil.rmtree(left)
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}{SUFFIX}")
    folder.mkdir()
    with _held(folder):
        try:
            yield folder
            folder.rename(out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder. Raises OSError where another does, or there is none."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
