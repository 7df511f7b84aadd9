"""What the process that talks to wandb does: follow a run's files while they grow, or send what a server has not got yet.

NOTE: a process and not a thread, because `import wandb` replaces sys.exit and sys.excepthook, and at exit waits for its
service: 9 to 12 s with a server that does not answer (wandb 0.31). It runs this file alone and may not find distcond.

The rows of one step are one row of wandb. Steps of wandb only rise: what a run repeats after a crash is skipped, for it is
what was sent before.
"""

import contextlib
import fcntl
import html
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

INIT_TIMEOUT_S = 10
"The longest that a server is waited for, before going on offline or giving up."
FINISH_TIMEOUT_S = 60
"The longest that a server may take for the last rows of `distcond sync`."
POLL_S = 0.5
"Between two looks for new rows."
GOOD_END = b"end"
"What the run tells its mirror last, if it can."
TABLE, MAP, TREE = "val/samples", "val/computation", "val/tree"
BUSY, NO_KEY = "busy", "no key"
"What `send` may answer instead of the error."


def _main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # wandb's chatter is no answer
    orders = os.fdopen(sys.stdin.fileno(), "rb", buffering=0)  # NOTE: a thread inside a buffered read breaks the exit
    task = json.loads(orders.readline())
    if task["what"] == "send":
        _send(task, answers)
    else:
        _follow(task, orders, answers)


def _follow(task: dict[str, Any], orders: BinaryIO, answers: TextIO) -> None:
    """Copy rows until `orders` end; without GOOD_END as last word the run has crashed. Answers are warnings."""
    last_word: list[bytes] = []
    ended = threading.Event()

    def wait_for_end() -> None:
        last_word.append(orders.read())
        signal.alarm(task["outlives_s"])
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    try:
        with contextlib.ExitStack() as stack:
            mark = stack.enter_context(_alone(task)) if task["mode"] != "offline" else None
            run, is_online = _start_run(task, answers)
            if not is_online:
                stack.close()  # `distcond sync` may send it meanwhile
            # Online it is one wandb run over all of its starts; offline every start is a file of its own.
            after = max(task["sent"], run.step - 1) if is_online else -1
            copy = _Copy(run, task, after, 0 if is_online else task["start"], answers)
            while not ended.wait(POLL_S):
                copy.rows()
            copy.rows()
            _finish(run, exit_code=int(last_word != [GOOD_END]))
            if is_online and mark:
                mark(copy.last)
    except Exception as error:
        answers.write(f"wandb stopped ({_one_line(error)}); metrics.jsonl has every row: distcond sync {task['run']['dir']}\n")
        raise


def _send(task: dict[str, Any], answers: TextIO) -> None:
    """Send what lies after the step that the server has. Answers are lines of JSON: that it started, then how it ended."""
    import wandb
    from wandb.sdk.lib import wbauth

    os.environ.pop("WANDB_MODE", None)  # of training
    settings = _settings(finish_timeout=FINISH_TIMEOUT_S, finish_timeout_raises=True)
    try:
        with _alone(task, wait=False) as mark:
            if not wbauth.authenticate_session(host=wandb.setup(settings).settings.base_url, source="distcond", prompt=False):
                answers.write(json.dumps({"error": NO_KEY}) + "\n")
                return
            run = wandb.init(**task["run"], mode="online", resume="allow", settings=settings)
            answers.write(json.dumps({"started": run.step}) + "\n")
            run.define_metric("*", step_metric="step")
            copy = _Copy(run, task, max(task["sent"], run.step - 1), 0, answers)
            copy.rows(task["until"])
            _finish(run)
            mark(copy.last)
            answers.write(json.dumps({"sent": copy.count, "step": copy.last}) + "\n")
    except BlockingIOError:
        answers.write(json.dumps({"error": BUSY}) + "\n")
    except Exception as error:
        answers.write(json.dumps({"error": _one_line(error)}) + "\n")
        raise


@contextlib.contextmanager
def _alone(task: dict[str, Any], wait: bool = True) -> Iterator[Any]:
    """Be the only one that sends this run; yields what notes down the last step that a server has got."""
    file = Path(task["sent_file"])
    file.parent.mkdir(exist_ok=True)
    with file.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

        def mark(step: int) -> None:
            known = json.loads(file.read_text()) if file.is_file() else {}
            sent = known.get("sent", {}) | {task["server"]: max(step, task["sent"])}
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"id": task["run"]["id"], "sent": sent}) + "\n")
            temporary.replace(file)

        yield mark


def _start_run(task: dict[str, Any], answers: TextIO) -> tuple[Any, bool]:
    """The `wandb.Run` and whether it is online; offline, with one warning, if the server cannot be had."""
    import wandb
    from wandb.sdk.lib import wbauth

    mode, run = task["mode"], task["run"]
    settings = _settings(x_stats_pid=os.getppid())  # the run's usage
    started = None
    try:
        host = wandb.setup(settings).settings.base_url
        if mode == "auto" and wbauth.authenticate_session(host=host, source="distcond", prompt=False):
            mode = "online"
        if mode == "online":
            started = wandb.init(**run, mode="online", resume="allow", settings=settings)
    except (wandb.Error, OSError) as error:
        wandb.teardown()  # else the id counts as taken
        answers.write(f"wandb is offline ({_one_line(error)}); upload later with: distcond sync {run['dir']}\n")
    is_online = started is not None
    started = started or wandb.init(**run, mode="offline", settings=settings)
    started.define_metric("*", step_metric="step")
    return started, is_online


def _finish(run: Any, exit_code: int = 0) -> None:
    """Wait until a server has every row. Raises RuntimeError where it refused them.

    NOTE: `run.finish` is silent about that (wandb 0.31); its service's own log is not.
    """
    log = Path(run.settings.log_internal)
    run.finish(exit_code=exit_code)
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []:
        if "filestream: fatal error" in line:
            raise RuntimeError(json.loads(line)["msg"])


def _settings(**more: Any) -> Any:
    import wandb

    return wandb.Settings(console="off", init_timeout=INIT_TIMEOUT_S, **more)


class _Copy:
    """Logs the rows of metrics.jsonl after a step, and beside that of a validation its samples and its trees, as pictures."""

    def __init__(self, run: Any, task: dict[str, Any], after: int, start: int, answers: TextIO) -> None:
        self._run, self._after, self._answers = run, after, answers
        self._metrics = Path(task["metrics"]).open("rb")  # noqa: SIM115 - open as long as the process
        self._metrics.seek(start)
        self._samples, self._trees = _Beside(task["samples"], "samples"), _Beside(task["trees"], "layers")
        self._skips_media = False
        self.count, self.last = 0, after

    def rows(self, until: float = math.inf) -> None:
        """Log what is complete, up to a step; a line still being written is left for the next look."""
        for row in _lines(self._metrics):
            step = int(row["step"])
            if step <= self._after:
                continue
            if step > until:
                return
            self._run.log({key: math.nan if value is None else value for key, value in row.items()}, step=step)
            self.count, self.last = self.count + 1, step
            self._media(step)

    def _media(self, step: int) -> None:
        """Log what there is to see of this step. Media that cannot be sent cost no row."""
        samples, layers = self._samples.take(step), self._trees.take(step)
        if not (samples or layers) or self._skips_media:
            return
        import wandb

        try:
            media: dict[str, Any] = {}
            if samples:
                values = [[json.dumps(value) if isinstance(value, list) else value for value in row.values()] for row in samples]
                media[TABLE] = wandb.Table(columns=list(samples[0]), data=values)
            for name, page in ((MAP, computation_map(samples)), (TREE, tree_map(layers))):
                if page:
                    media[name] = wandb.Html(page, inject=False)
            self._run.log(media, step=step)
        except Exception as error:  # noqa: BLE001 - whatever wandb makes of its server's answer
            self._skips_media = True
            print(f"pictures and tables are not sent any more: {_one_line(error)}", file=sys.stderr)  # noqa: T201


class _Beside:
    """Lines of a file beside metrics.jsonl, by step; it may come to be later, or never."""

    def __init__(self, file: str, key: str) -> None:
        self._place, self._key = Path(file), key
        self._file: BinaryIO | None = None
        self._found: dict[int, list[dict[str, Any]]] = {}

    def take(self, step: int) -> list[dict[str, Any]]:
        """What stands under the key at a step, once; empty where there is nothing."""
        if self._file is None and self._place.is_file():
            self._file = self._place.open("rb")
        if self._file is not None:
            self._found |= {int(line["step"]): line[self._key] for line in _lines(self._file)}
        return self._found.pop(step, [])


def computation_map(samples: list[dict[str, Any]]) -> str:
    """Bytes coloured by executed steps, underlined by loss, as a page; empty where samples are not of bytes."""
    texts = [sample for sample in samples if isinstance(sample.get("target"), str) and "loss" in sample]
    most = max((max(sample["steps"]) for sample in texts), default=1)
    parts = []
    for sample in texts:
        at, spans = 0, []
        for letter in sample["target"]:
            steps, loss = sample["steps"][at], sample["loss"][at]  # of its first byte
            at += len(letter.encode())
            shown = html.escape("\u21b5\n" if letter == "\n" else letter)
            share, line = (steps - 1) / max(most - 1, 1), min(loss, 8) / 2
            style = f"background:rgba(255,140,0,{share:.2f});border-bottom:{line:.1f}px solid #36c"
            spans.append(f'<span title="{steps} steps, {loss} bits" style="{style}">{shown}</span>')
            if at >= len(sample["steps"]):  # what is no UTF-8 was replaced by longer letters
                break
        parts.append(f"<pre>{''.join(spans)}</pre>")
    legend = f"<p>Background: executed steps, 1 to {most}. Line below: loss in bits.</p>"
    return f'<meta charset="utf-8">{legend}{"<hr>".join(parts)}' if parts else ""


WIDTH, ROW = 1000, 22
"Units of the map of a tree."


def tree_map(layers: list[dict[str, Any]]) -> str:
    """Levels of each tree, the root on top, as a page: width is usage, the filled height the norm of a node's matrix beside
    the largest of its level. Empty where there are none.
    """
    parts = []
    for layer in layers:
        levels = 1 + max(node[1] for node in layer["nodes"])
        most = [max(node[5] for node in layer["nodes"] if node[1] == level) for level in range(levels)]
        shown = f"levels 0 to {levels - 1} of {layer['depth']}"
        for tree in sorted({node[0] for node in layer["nodes"]}):
            boxes = "".join(_box(node, layer["tokens"], most) for node in layer["nodes"] if node[0] == tree)
            of = f", tree {tree + 1} of {layer['trees']}" if layer["trees"] > 1 else ""
            name = html.escape(f"{layer['layer']}{of}: {shown}, {layer['tokens']:,} tokens")
            size = f'viewBox="0 0 {WIDTH} {ROW * levels}" width="100%" height="{ROW * levels}" preserveAspectRatio="none"'
            parts.append(f'<p>{name}</p><svg {size} role="img" aria-label="{name}">{boxes}</svg>')
    legend = "Width: share of the tokens since the last validation. Height: norm of the matrix beside the largest of its level."
    return f'<meta charset="utf-8"><style>body{{font:13px sans-serif}}</style><p>{legend}</p>{"".join(parts)}' if parts else ""


def _box(node: list[Any], total: int, most: list[float]) -> str:
    _, level, prefix, left, tokens, norm = node
    x, y, width, height = WIDTH * left / total, ROW * level, max(WIDTH * tokens / total - 0.6, 0.4), ROW - 2
    filled = height * norm / most[level] if most[level] else 0.0
    bits = f"{prefix:0{level}b}" if level else "root"
    tip = f"{bits}: {tokens:,} tokens, {100 * tokens / total:.3g}%, norm {norm:.4g}"
    place = f'x="{x:.1f}" width="{width:.1f}"'
    return (
        f'<rect {place} y="{y}" height="{height}" fill="#e4e7eb"><title>{tip}</title></rect>'
        f'<rect {place} y="{y + height - filled:.1f}" height="{filled:.1f}" fill="#36c" pointer-events="none"/>'
    )


def _lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    while (line := file.readline()).endswith(b"\n"):
        yield json.loads(line)
    file.seek(-len(line), os.SEEK_CUR)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


if __name__ == "__main__":
    _main()
