"""What tests share: ranks on this machine, small configurations, runs without Ray."""

import gc
import json
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from distcond.config import Config
from distcond.data.batches import Feeder, LocalFeeder
from distcond.train.run_folder import RunFolder

HANG_S = 240.0
"Ranks that take longer than this hang; the slowest work takes 20 s on two cores."

# NOTE: ranks are forked from a server that has imported everything (which costs a rank 5 s; some names are what its first
# step would import), so a launch of two ranks costs 0.15 s of processor time and every launch has fresh processes.
_ranks = multiprocessing.get_context("forkserver")
_ranks.set_forkserver_preload(
    [
        *("distcond.train.loop", "torch._dynamo", "numpy.ctypeslib"),
        *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3"),
        *("pytest", "tests.helpers", "tests.train.traces", "tests.train.foreign"),
    ]
)


def run_ranks(work: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What `work(*args)` returns on each rank of a gloo group, each in a process of its own.

    If a rank fails, its traceback is the message of an AssertionError; `work` must be found by its module and name.
    world_size 0: one process that is in no group.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _ranks.Process(target=_run_rank, args=(work, rank, world_size, Path(folder), args), daemon=True)
            for rank in range(max(1, world_size))
        ]
        for process in ranks:
            process.start()
        try:
            _wait_for(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        answers = [_answer(Path(folder) / f"rank_{rank}", process) for rank, process in enumerate(ranks)]
    failed = [f"rank {rank} of {world_size}:\n{answer}" for rank, (is_done, answer) in enumerate(answers) if not is_done]
    assert not failed, "\n".join(failed)
    return [answer for _, answer in answers]


def _wait_for(ranks: list[Any]) -> None:
    """Until all have ended, one has failed, or HANG_S have passed."""
    end = time.monotonic() + HANG_S
    while running := [process for process in ranks if process.exitcode is None]:
        wait([process.sentinel for process in running], max(0.0, end - time.monotonic()))
        if time.monotonic() >= end or any(process.exitcode for process in ranks):
            return


def _answer(file: Path, process: Any) -> tuple[bool, Any]:
    if not file.exists():
        return False, f"no answer, exit status {process.exitcode} (-9: killed, because it hung or another rank failed)"
    answer: tuple[bool, Any] = pickle.loads(file.read_bytes())
    return answer


def _run_rank(work: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported is there to stay; ZeRO 3 collects garbage often
    answer: tuple[bool, Any]
    try:
        if world_size:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        answer = (True, work(*args))
        if world_size:
            dist.barrier()
    except BaseException:  # noqa: BLE001 - becomes the test's message
        answer = (False, traceback.format_exc())
    written = folder / f"rank_{rank}.tmp"
    written.write_bytes(pickle.dumps(answer))
    written.replace(folder / f"rank_{rank}")  # in one move, for it may be killed meanwhile
    os._exit(not answer[0])  # DeepSpeed's exit handlers would wait on process groups that are gone


def asked_for(request: Any, *parameters: str) -> list[Any]:
    """What the tests that will run in this session ask a fixture for: the values of their parameter, or tuples of several."""
    items = [item for item in request.session.items if request.fixturename in item.fixturenames and hasattr(item, "callspec")]
    values = [tuple(item.callspec.params[name] for name in parameters) for item in items]
    return list(dict.fromkeys(value if len(parameters) > 1 else value[0] for value in values))


def changed(config: Any, **changes: Any) -> Any:
    """A copy of a configuration with other values for some dotted keys, with "__" for ".": optim__lr=1e-2."""
    sections: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for key, value in changes.items():
        name, _, rest = key.partition("__")
        if rest:
            sections.setdefault(name, {})[rest] = value
        else:
            old = getattr(config, name)
            values[name] = type(old)(value) if isinstance(old, StrEnum) else value
    values |= {name: changed(getattr(config, name), **inner) for name, inner in sections.items()}
    return replace(config, **values)


def small_config(folder: Path | str, **changes: Any) -> Config:
    """A parity run of a few seconds; `changes` as in `changed`."""
    base = {
        "run__dir": str(folder),
        "run__name": "run",
        "model__name": "rnn",
        "model__width": 16,
        "model__tree__depth": 3,
        "model__tree__full_depth": 1,
        "model__tree__rank": 2,
        "model__halting__kind": "act",
        "model__halting__max_steps": 4,
        "data__name": "parity",
        "data__num_bits": 8,
        "data__global_batch_size": 8,
        "data__validation_examples": 12,
        "train__max_steps": 4,
        "train__log_every": 1,
        "train__eval_every": 2,
        "checkpoint__every": 2,
        "optim__lr": 1e-2,
        "tracking__mode": "disabled",
    }
    config: Config = changed(Config(), **{**base, **changes})
    return config


def text_config(folder: Path, **changes: Any) -> Config:
    """A transformer run of a few seconds on text that is written into `folder`."""
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for number in range(8):
            (corpus / f"{number}.txt").write_bytes(_prose(number, 4096))
    base = {
        "model__name": "transformer",
        "model__heads": 2,
        "model__feed_forward": 32,
        "data__name": "text",
        "data__files": [f"{corpus}/*.txt"],
        "data__cache_dir": str(folder / "cache"),
        "data__context": 16,
    }
    return small_config(folder, **{**base, **changes})


def _prose(seed: int, size: int) -> bytes:
    """Text of no meaning, the same everywhere: words drawn by a linear congruential generator (Knuth's constants)."""
    words = [b"tree", b"ponder", b"halt", b"gate", b"leaf", b"a", b"the", b"of", b"deep", b"node", b".\n"]
    state, text = seed, b""
    while len(text) < size:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        text += words[(state >> 33) % len(words)] + b" "
    return text[:size]


def train_here(config: Config, make_feeder: Callable[[Config, int, int], Feeder] = LocalFeeder) -> dict[str, Any]:
    """Train a run in this process (a rank of its group, or alone), without Ray; returns the summary."""
    # NOTE: here, because DeepSpeed belongs into the processes of ranks, not into the one that runs the tests.
    from distcond.train.loop import run_training

    rank = dist.get_rank() if dist.is_initialized() else 0
    feeder = make_feeder(config, rank, config.cluster.num_workers)
    return run_training(config, folder_of(config), feeder, asdict(config))


def folder_of(config: Config) -> RunFolder:
    """The folder of a run, ready to be written to."""
    folder = RunFolder.of(config)
    folder.logs.mkdir(parents=True, exist_ok=True)
    return folder


def sealers_below(folder: Path) -> list[psutil.Process]:
    """Processes that write checkpoints of runs in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if len(words) > 3 and words[3].endswith("sealing.py") and Path(words[-1]).is_relative_to(folder):
            found.append(process)
    return found


def train_run(config: Config, make_feeder: Callable[[Config, int, int], Feeder] = LocalFeeder) -> dict[str, Any]:
    """Train a run on as many ranks as it asks for; returns the summary, which is the same on all of them."""
    summaries = run_ranks(train_here, config.cluster.num_workers, config, make_feeder)
    assert all(summary == summaries[0] for summary in summaries)
    return summaries[0]


def metric_rows(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl, without what a clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("perf/", "mem/"))} for row in rows]
