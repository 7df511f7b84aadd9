"""Where metrics go: `metrics.jsonl`, which is the truth, and a wandb run that mirrors it.

The mirror is a child process that follows the file. NOTE: not a thread, because `import wandb` replaces sys.exit and
sys.excepthook, and at exit waits for its service: 9 to 12 s with a server that does not answer (wandb 0.31).
"""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, TextIO

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
"The longest that training waits for the mirror."
ORPHAN_TIMEOUT_S = 5
"The longest that the mirror outlives the run, in whole seconds."
INIT_TIMEOUT_S = 10
"The longest that the mirror waits for a server before it goes on offline."
POLL_S = 0.5
"Between two looks for new rows."
GOOD_END = b"end"
"What the run tells the mirror last, if it can."


class Tracker:
    """Writes the metrics of a run; only rank 0 has one. No method waits longer than CLOSE_TIMEOUT_S."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        mode: str,
        project: str,
        group: str,
        name: str,
        run_id: str,
        resume_step: int,
    ) -> None:
        """Rows after `resume_step` are cut from RUN/metrics.jsonl; wandb keeps its files in RUN/wandb.

        mode: auto, offline, online or disabled (no wandb at all); with auto, WANDB_MODE decides where it is set.
        """
        self._metrics = metrics = folder / "metrics.jsonl"
        _cut_back(metrics, resume_step)
        metrics.touch()
        self._unwritten = ""
        self._mirror: _Mirror | None = None
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE", mode)
        if mode != "disabled":
            run = {"project": project, "group": group, "name": name, "id": run_id, "config": config, "dir": str(folder)}
            start = metrics.stat().st_size
            self._mirror = _Mirror(folder, {"metrics": str(metrics), "start": start, "mode": mode, "run": run})

    def log(self, row: dict[str, float]) -> None:
        """Append one row, which carries `step`, as a line of JSON; NaN and infinity become null.

        A row that the disk does not take (it is full, or gone) is kept and written with a later one.
        """
        line = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._unwritten += json.dumps(line, allow_nan=False) + "\n"
        self._write()

    def close(self) -> None:
        """Finish the mirror; if that takes longer than CLOSE_TIMEOUT_S, it goes on alone, at most ORPHAN_TIMEOUT_S."""
        self._write()
        if self._mirror is not None:
            self._mirror.close()

    def _write(self) -> None:
        if not self._unwritten:
            return
        size = None
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                size = file.tell()
                file.write(self._unwritten)
            self._unwritten = ""
        except OSError as error:
            log.warning("%s: %s; the row is kept.", self._metrics, error.strerror)
            with contextlib.suppress(OSError):
                if size is not None:  # a part of a line may be there
                    os.truncate(self._metrics, size)


def _cut_back(metrics: Path, resume_step: int) -> None:
    """Drop rows after `resume_step`, and a last line that a kill left unfinished."""
    if not metrics.exists():
        return
    old = metrics.read_bytes()
    new = b"".join(line + b"\n" for line in old.splitlines() if _step(line) <= resume_step)
    if new != old:
        temporary = metrics.with_name("metrics.jsonl.tmp")
        temporary.write_bytes(new)
        temporary.replace(metrics)


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):  # no JSON, or not a row
        return math.inf


class _Mirror:
    """The child process as training sees it: told once what to do and once to end; it answers with warnings only."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        from distcond.redaction import without_user  # NOTE: here, because the child runs this file and may not find distcond

        # NOTE: wandb looks for its error reporting even offline; an offline run must not touch the network.
        environment = {"WANDB_ERROR_REPORTING": "false", **os.environ}
        environment.pop("WANDB_SERVICE", None)  # another wandb of this process
        if "WANDB_BASE_URL" in environment:  # wandb logs it, and gives its key, not a user and password, to the server
            environment["WANDB_BASE_URL"] = without_user(environment["WANDB_BASE_URL"])
        (folder / "logs").mkdir(exist_ok=True)
        with (folder / "logs" / "wandb.log").open("ab") as chatter:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],  # a file, not a module: a Ray worker's sys.path is not its child's
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=chatter,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run; the mirror still has its last rows to copy
            )
        self._tell(json.dumps(task).encode() + b"\n")
        self._reader = threading.Thread(target=self._pass_on_warnings, daemon=True)
        self._reader.start()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._tell(GOOD_END)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._reader.join(CLOSE_TIMEOUT_S)

    def _tell(self, message: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died, and has said why
            self._process.stdin.write(message)
            self._process.stdin.flush()

    def _pass_on_warnings(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                log.warning("%s", line.decode().rstrip())
        self._process.wait()


def _run_mirror() -> None:
    """The child process: copies rows to wandb until stdin ends; without GOOD_END as last word the run has crashed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # wandb's chatter is no answer
    orders = os.fdopen(sys.stdin.fileno(), "rb", buffering=0)  # NOTE: a thread inside a buffered read breaks the exit
    task = json.loads(orders.readline())
    last_word: list[bytes] = []
    ended = threading.Event()

    def wait_for_end() -> None:
        last_word.append(orders.read())
        signal.alarm(ORPHAN_TIMEOUT_S)
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    try:
        run = _start_run(task["mode"], task["run"], answers)
        run.define_metric("*", step_metric="step")
        with Path(task["metrics"]).open("rb") as metrics:
            metrics.seek(task["start"])
            while not ended.wait(POLL_S):
                _copy_rows(metrics, run)
            _copy_rows(metrics, run)
        run.finish(exit_code=int(last_word != [GOOD_END]))
    except Exception as error:
        answers.write(f"wandb stopped ({_one_line(error)}); metrics.jsonl has every row.\n")
        raise


def _start_run(mode: str, run: dict[str, Any], answers: TextIO) -> Any:
    """The `wandb.Run`; offline, with one warning, if the server cannot be had."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.Settings(console="off", init_timeout=INIT_TIMEOUT_S, x_stats_pid=os.getppid())  # the run's usage
    try:
        host = wandb.setup(settings).settings.base_url
        if mode == "auto" and wbauth.authenticate_session(host=host, source="distcond", prompt=False):
            mode = "online"
        if mode == "online":
            return wandb.init(**run, mode="online", resume="allow", settings=settings)
    except (wandb.Error, OSError) as error:
        folder = Path(run["dir"]) / "wandb"
        wandb.teardown()  # else the id counts as taken
        answers.write(f"wandb is offline ({_one_line(error)}); upload later with: wandb sync {folder}/offline-run-*\n")
    return wandb.init(**run, mode="offline", settings=settings)


def _copy_rows(metrics: BinaryIO, run: Any) -> None:
    """Log the rows that are complete; a line still being written is left for the next look."""
    while (line := metrics.readline()).endswith(b"\n"):
        row = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
        run.log(row, step=int(row["step"]))
    metrics.seek(-len(line), os.SEEK_CUR)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


if __name__ == "__main__":
    _run_mirror()
