"""Where metrics go while a run trains: `metrics.jsonl` and the samples beside it, and a wandb run that follows them."""

import contextlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distcond.finite import finite
from distcond.tracking import child
from distcond.tracking.identity import SENT_FILE, WandbRun, last_sent, server
from distcond.tracking.mirror import GOOD_END

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
"The longest that training waits for the mirror."
ORPHAN_TIMEOUT_S = 5
"The longest that the mirror outlives the run, in whole seconds."
METRICS, SAMPLES, TREES = Path("metrics.jsonl"), Path("eval") / "samples.jsonl", Path("eval") / "trees.jsonl"
"In a run folder."


class Tracker:
    """Writes the metrics of a run; only rank 0 has one. No method waits longer than CLOSE_TIMEOUT_S."""

    def __init__(
        self, folder: Path, run: WandbRun, mode: str, resume_step: int, note: Callable[[str], None] = log.warning
    ) -> None:
        """Rows after `resume_step` are cut from what is there; wandb keeps its files in RUN/wandb.

        mode: auto, offline, online or disabled (no wandb at all); with auto, WANDB_MODE decides where it is set. note: told
        where a run that is to be online is not; with other modes that is a warning in the log.
        """
        self._metrics, self._samples, self._trees = (_Rows(folder, name, resume_step) for name in (METRICS, SAMPLES, TREES))
        self._metrics.file.touch()
        self._mirror: _Mirror | None = None
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE", mode)
        if mode != "disabled":
            start = self._metrics.file.stat().st_size
            task = {"what": "follow", "mode": mode, "start": start, "outlives_s": ORPHAN_TIMEOUT_S, **what_of(folder, run)}
            self._mirror = _Mirror(folder, task, note if mode == "online" else log.warning)

    def log(self, row: dict[str, float]) -> None:
        """Append one row, which carries `step`, as a line of JSON; NaN and infinity become null.

        A row that the disk does not take (it is full, or gone) is kept and written with a later one.
        """
        self._metrics.append(row)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append what the model makes of some examples, as mappings of the same keys, before the row of the same step."""
        self._samples.append({"step": step, "samples": [dict(sample) for sample in samples]})

    def log_trees(self, step: int, layers: Sequence[Mapping[str, Any]]) -> None:
        """Append what tokens went through in the tree layers, as JSON, before the row of the same step."""
        self._trees.append({"step": step, "layers": [dict(layer) for layer in layers]})

    def close(self) -> None:
        """Finish the mirror; if that takes longer than CLOSE_TIMEOUT_S, it goes on alone, a few seconds at most."""
        for rows in (self._samples, self._trees, self._metrics):
            rows.write()
        if self._mirror is not None:
            self._mirror.close()


def what_of(folder: Path, run: WandbRun) -> dict[str, Any]:
    """What a mirror is told of the run."""
    return {
        "run": run.arguments(folder),
        "metrics": str(folder / METRICS),
        "samples": str(folder / SAMPLES),
        "trees": str(folder / TREES),
        "sent_file": str(folder / SENT_FILE),
        "sent": last_sent(folder),
        "server": server(),
    }


class _Rows:
    """A file of JSON lines that only grows, save that a resumed run takes back what it will repeat."""

    def __init__(self, folder: Path, name: Path, resume_step: int) -> None:
        self.file, self._folder, self._unwritten = folder / name, folder, ""
        if self.file.exists():
            _cut_back(self.file, resume_step)

    def append(self, row: Mapping[str, Any]) -> None:
        self._unwritten += json.dumps(finite(row), allow_nan=False) + "\n"
        self.write()

    def write(self) -> None:
        if not self._unwritten:
            return
        size = None
        try:
            if self.file.parent != self._folder:  # NOTE: the run's folder is not to be made where its disk is gone
                self.file.parent.mkdir(exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                size = file.tell()
                file.write(self._unwritten)
            self._unwritten = ""
        except OSError as error:
            log.warning("%s: %s; the row is kept.", self.file, error.strerror)
            with contextlib.suppress(OSError):
                if size is not None:  # a part of a line may be there
                    os.truncate(self.file, size)


def _cut_back(file: Path, resume_step: int) -> None:
    """Drop rows after `resume_step`, and a last line that a kill left unfinished."""
    old = file.read_bytes()
    new = b"".join(line + b"\n" for line in old.splitlines() if _step(line) <= resume_step)
    if new != old:
        temporary = file.with_name(f"{file.name}.tmp")
        temporary.write_bytes(new)
        temporary.replace(file)


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):  # no JSON, or not a row
        return math.inf


class _Mirror:
    """The process that follows the files as training sees it: told what to do, then to end; it answers with warnings only."""

    def __init__(self, folder: Path, task: dict[str, Any], note: Callable[[str], None]) -> None:
        self._process, self._note = child.start(folder, task), note
        self._reader = threading.Thread(target=self._pass_on_warnings, daemon=True)
        self._reader.start()

    def close(self) -> None:
        assert self._process.stdin is not None
        child.tell(self._process, GOOD_END)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._reader.join(CLOSE_TIMEOUT_S)

    def _pass_on_warnings(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._note(line.decode().rstrip())
        self._process.wait()
