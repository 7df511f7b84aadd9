"""What is told of a rank that ran out of memory: how many bytes it asked for and where, or who ended it."""

import re
import traceback
from pathlib import Path

from distcond.cluster.policy import OUT_OF_MEMORY

PACKAGE = Path(__file__).parent.parent
SIZE = re.compile(
    r"tried to allocate (?P<asked>[\d.]+ (?:bytes|[KMGT]iB))"  # torch, on the host and on a GPU
    r"|Unable to allocate (?P<array>[\d.]+ (?:bytes|[KMGTPE]iB) for an array with shape \([\d, ]*\))",  # numpy
    re.IGNORECASE,
)
SIGNS = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc|Unable to allocate", re.IGNORECASE)
"What the messages of torch (CPU and CUDA), C++ and numpy have in common."

VMSTAT = Path("/proc/vmstat")


class NoMemoryError(RuntimeError):
    """A rank that could not allocate. The message is all there is, so that it survives pickling between processes."""


def out_of_memory(error: BaseException) -> NoMemoryError | None:
    """The error as one line, if it says that memory could not be allocated in this process; None if it says anything else."""
    text = str(error)
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and SIGNS.search(text)):
        return None
    found = SIZE.search(text)
    size = (found["asked"] or found["array"]) if found else "an unknown number of bytes"
    return NoMemoryError(f"{OUT_OF_MEMORY}: {_with_commas(size)} asked for in {_place(error)}")


def kernel_kills() -> int:
    """Processes of this machine that its kernel has ended for want of memory, in all; 0 where it does not count them."""
    counts = dict(line.split() for line in VMSTAT.read_text().splitlines()) if VMSTAT.exists() else {}
    return int(counts.get("oom_kill", 0))


def _with_commas(size: str) -> str:
    number, _, rest = size.partition(" ")
    return f"{int(number):,} {rest}" if number.isdigit() else size


def _place(error: BaseException) -> str:
    """The innermost line of a named function of this package that took part, and what it was doing."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE) and not frame.name.startswith("<")]
    if not ours:
        return "an unknown place"
    frame = ours[-1]
    return f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno} ({frame.name}: {frame.line})"
