"""Rivals: other ways to have weights chosen by data, each timed beside our own on the same work, in the same rounds.

They come from packages that distcond does not need; each is imported where it is made, and one that is missing is named.
NOTE: the only place beside train/ that knows DeepSpeed, here as what it is compared with.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping

from distcond.bench.report import Row

INSTALL = "pip install 'distcond[bench]'"


def against(rivals: Mapping[str, Callable[[bool], Iterator[Row]]], quick: bool) -> Iterator[Row]:
    """The rows of each rival, by name, called with `quick`; a row that names it where its package is missing."""
    for name, rows in rivals.items():
        try:
            with contextlib.redirect_stdout(sys.stderr):  # rivals have much to say
                found = list(rows(quick))
        except (ImportError, OSError) as error:  # OSError: libraries made for another torch
            found = [{"rival": name, "missing": f"{error}; {INSTALL}"}]
        yield from found
