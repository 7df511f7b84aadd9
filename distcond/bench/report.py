"""Rows of a bench as tables for people, and what they depend on beside the code."""

import platform
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch

from distcond import __version__
from distcond.ops import kernels

Row = Mapping[str, str | float]


def show(rows: Sequence[Row]) -> str:
    """A table for each run of rows with the same columns, in the order of its first row; numbers with three digits."""
    return "\n\n".join(_table(list(part)) for _, part in groupby(rows, key=list))


def machine() -> dict[str, str | int]:
    """What times depend on beside the code: processor, threads, versions, kernels."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distcond": __version__,
        "kernels": kernels(),
    }


def _table(rows: Sequence[Row]) -> str:
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _processor() -> str:
    """Name of the processor: from Linux, which tells it nowhere else, or whatever Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
