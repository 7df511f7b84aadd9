"""`distcond prepare`: the shards of a corpus written by many processes, with Ray Data."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distcond.cluster.local import ray_session
from distcond.cluster.progress import PLAIN_INTERVAL_S, duration
from distcond.config import ClusterConfig, Config, DataConfig
from distcond.data import absolute_paths
from distcond.data.corpus import Corpus, Run, in_turn, verify
from distcond.data.shard import SPLITS, Shard
from distcond.data.tasks import open_source, texts_of
from distcond.errors import DataError, UserError

# NOTE: Ray is imported, and started, only where there is more than one shard to write.


def prepare(config: Config) -> int:
    """Prepare the texts of a configuration, each to the same bytes as `distcond train` would; returns the exit status.

    Of a preparation that was interrupted, shards that are whole are not written again. What is prepared already is read
    and compared with its manifest. Raises DataError as `open_corpus` does, and where there is no text to prepare.
    """
    console = Console()
    texts = texts_of(absolute_paths(config.data))
    if not texts:
        raise DataError(
            f"data={config.data.name} is generated as it is needed; prepare a text, e.g. data=text data.files=[a.txt]."
        )
    with ExitStack() as stack:
        start_ray = cache(partial(_start_ray, stack, config.cluster.address))
        for text in texts:
            _prepare_one(text, partial(_run, start_ray), console)
    return 0


def in_parallel(shards: Sequence[Shard]) -> Iterator[int]:
    """Write shards with Ray Data on the Ray that is there, one to a core at a time; yields as `in_turn` does."""
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    numbers = ray.data.range(len(shards), override_num_blocks=len(shards))
    for row in numbers.map(partial(_write, shards), num_cpus=1).iter_rows():
        if row["error"]:
            raise DataError(row["error"])
        yield row["bytes"]


def _write(shards: Sequence[Shard], row: dict[str, Any]) -> dict[str, Any]:
    """What a task does. NOTE: the user's errors go home as text, because Ray Data would wrap them."""
    # One process to a core is enough: with threads of its own each, tokens take 1.4 times the processor time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        (size,) = in_turn([shards[row["id"]]])
    except UserError as error:
        return {"bytes": 0, "error": str(error)}
    return {"bytes": size, "error": ""}


def _run(start_ray: Callable[[], None], shards: Sequence[Shard]) -> Iterable[int]:
    if len(shards) < 2:
        return in_turn(shards)
    start_ray()
    return in_parallel(shards)


def _start_ray(stack: ExitStack, address: str) -> None:
    """For as long as the stack lives."""
    logs = Path(tempfile.mkdtemp(prefix="distcond-prepare-"))
    stack.callback(shutil.rmtree, logs, ignore_errors=True)
    stack.enter_context(ray_session(ClusterConfig(address=address), logs))


def _prepare_one(text: DataConfig, run: Run, console: Console) -> None:
    start, sizes = time.monotonic(), list[int]()

    def shown(shards: Sequence[Shard]) -> Iterator[int]:
        for size in _followed(run, shards, console):
            sizes.append(size)
            yield size

    corpus = open_source(text, shown)
    if sizes:
        seconds = time.monotonic() - start
        speed = f"{sum(sizes) / 1e6:,.1f} MB in {duration(seconds)}, {sum(sizes) / 1e6 / seconds:,.1f} MB/s"
    else:
        verify(corpus)
        speed = "was prepared already; every sha256 is the manifest's"
    for line in (f"{text.name:<7} {corpus.folder}", f"        {_counts(corpus)}", f"        {speed}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _counts(corpus: Corpus) -> str:
    unit = "tokens" if corpus.manifest["tokenizer"] else ""
    parts = []
    for split in SPLITS:
        counts = corpus.manifest[split]
        tokens = f", {counts['tokens']:,} {unit}" if unit else ""
        parts.append(f"{split} {counts['bytes']:,} bytes{tokens} of {counts['documents']:,} documents")
    return f"{'; '.join(parts)}; shards: {len(corpus.manifest['shards'])}"


def _followed(run: Run, shards: Sequence[Shard], console: Console) -> Iterator[int]:
    """The sizes of shards as they are written, with a bar, or lines where there is no terminal."""
    columns = (BarColumn(40), MofNCompleteColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn(compact=True))
    start = shown_at = time.monotonic()
    total = 0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(shards), done="")
        for number, size in enumerate(run(shards), start=1):
            total, now = total + size, time.monotonic()
            done = f"{total / 1e6:,.0f} MB  {total / 1e6 / (now - start):,.0f} MB/s"
            progress.update(task, completed=number, done=done)
            if not console.is_terminal and now - shown_at > PLAIN_INTERVAL_S:
                shown_at = now
                console.print(f"shard {number}/{len(shards)}  {done}", markup=False, highlight=False)
            yield size
