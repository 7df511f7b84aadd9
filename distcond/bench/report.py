"""Rows of a bench as a table for people."""

from collections.abc import Mapping, Sequence

Row = Mapping[str, str | float]


def show(rows: Sequence[Row]) -> str:
    """Columns in the order of the first row; numbers with three digits."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
