"""What the user sees while a run is on: a bar that follows RUN/metrics.jsonl, or plain lines where there is no terminal."""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from distcond.redaction import redact
from distcond.train.run_folder import is_there

PLAIN_INTERVAL_S = 5.0
"The least time between two lines where there is no terminal."
FIGURES = {
    "train/loss": "loss {:.4g}",
    "train/bpb": "{:.3f} bits/byte",
    "val/bpb": "val {:.3f} bits/byte",
    "val/sequence_error": "val error {:.3g}",
    "ponder/steps": "{:.2f} ponder steps",
    "perf/tokens_per_s": "{:,.0f} tokens/s",
}
"What is shown of the metrics, in this order; rows have some of them."


class Tail:
    """The lines that a file gains from now on, or all of them.

    It may not exist yet. Where another file takes its place, as metrics that are cut back do, all lines of that one are new.
    """

    def __init__(self, file: Path, *, whole: bool = False) -> None:
        self._file = file
        self._inode, self._position = -1, 0
        if not whole and is_there(file):
            status = file.stat()
            self._inode, self._position = status.st_ino, status.st_size

    def read(self) -> list[str]:
        """Complete lines that are new since the last call; none where storage does not answer."""
        try:
            with self._file.open("rb") as stream:
                inode = os.fstat(stream.fileno()).st_ino
                position = min(self._position if inode == self._inode else 0, stream.seek(0, os.SEEK_END))
                stream.seek(position)
                text = stream.read()
        except OSError:
            return []
        self._inode, self._position = inode, position
        text = text[: text.rfind(b"\n") + 1]
        self._position += len(text)
        return text.decode().splitlines()


class Progress:
    """Shows a run as it goes. A context manager; `poll` is to be called a few times a second."""

    def __init__(self, console: Console, metrics: Path, max_steps: int) -> None:
        self._console, self._rows, self._max_steps = console, Tail(metrics), max_steps
        self._figures: dict[str, Any] = {}
        self._first: tuple[int, float] | None = None
        self._status = ""
        self._shown_at, self._is_shown = 0.0, True
        self._live = Live(console=console, auto_refresh=True, refresh_per_second=8, get_renderable=self._render)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.poll()
        self._show_line(last=True)
        self.close()

    def close(self) -> None:
        """Leave the screen as it is."""
        self._live.stop()

    def wait_for(self, what: str) -> None:
        """Say what the run is waiting for; it is shown until there are figures."""
        self._status = what
        if not self._console.is_terminal:
            self.note(f"waiting for {what} ...")

    def note(self, line: str) -> None:
        """A line that stays on the screen."""
        self._console.print(redact(line), markup=False, highlight=False, soft_wrap=True)

    def poll(self) -> None:
        """Show the rows that are new in the file."""
        rows = [json.loads(line) for line in self._rows.read()]
        for row in rows:
            self._figures |= {key: value for key, value in row.items() if value is not None}
        if rows:
            self._first = self._first or (self._step, time.monotonic())
            self._is_shown = False
        self._show_line()

    def _show_line(self, last: bool = False) -> None:
        due = last or time.monotonic() - self._shown_at >= PLAIN_INTERVAL_S
        if self._is_shown or not due or self._console.is_terminal:
            return
        self._shown_at, self._is_shown = time.monotonic(), True
        self.note(f"step {self._step}/{self._max_steps}  {figures(self._figures)}{self._left('  ')}")

    @property
    def _step(self) -> int:
        return int(self._figures.get("step", 0))

    def _left(self, before: str) -> str:
        assert self._first is not None
        left = seconds_left(self._first, (self._step, time.monotonic()), self._max_steps)
        return "" if left is None else f"{before}{duration(left)} left"

    def _render(self) -> Any:
        if self._first is None:
            return Spinner("dots", Text(f"waiting for {self._status} ..."))
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(self._max_steps, self._step, width=40), f"{self._step}/{self._max_steps}", self._left(""))
        return Group(bar, Text(figures(self._figures)))


def figures(row: dict[str, Any]) -> str:
    """The figures of a row that are worth showing, in words."""
    return "  ".join(text.format(row[key]) for key, text in FIGURES.items() if key in row)


def seconds_left(first: tuple[int, float], now: tuple[int, float], max_steps: int) -> float | None:
    """Time to `max_steps` at the pace between two points (step, seconds); None where there is no pace yet."""
    steps, elapsed = now[0] - first[0], now[1] - first[1]
    return (max_steps - now[0]) * elapsed / steps if steps > 0 else None


def duration(seconds: float) -> str:
    """E.g. 0:07, 12:30 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
