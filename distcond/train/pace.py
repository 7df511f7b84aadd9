"""How long a step of a run takes, before it is started: `--dry-run` says from it what a crash can cost."""

import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from distcond.config import Config, HaltingKind
from distcond.config.run import micro_batch_size
from distcond.data.batch import Batch
from distcond.data.tasks import build_task, shape_of
from distcond.train.fits import cost_of
from distcond.train.run_folder import RunFolder

RECENT_ROWS = 10
"Of the metrics of a run that are looked at."
MOST_EXAMPLES = 4
"Of a micro-batch that is timed: a dry run takes seconds."
TIMED_STEPS = 3
"The fastest one counts: the first warms up, and whatever else runs here only makes them slower."
MOST_MACS, MOST_WEIGHTS = 2e10, 2e7
"About a second of one core."


def seconds_per_step(config: Config) -> tuple[float, str] | None:
    """Seconds of one optimiser step, and where they are from: the metrics of this very run, else a few examples timed here.

    The latter are forward and backward passes in this process: without other ranks, their exchange, or the update. None for
    GPUs, and for models that multiply more than MOST_WEIGHTS or MOST_MACS.
    """
    known = _recent_step_ms(RunFolder.of(config).metrics) if config.run.name else []
    if known:
        return statistics.median(known) / 1e3, "by its metrics"
    halting, length = config.model.halting, shape_of(config.data).max_length
    most_steps = 1 if halting.kind == HaltingKind.none else halting.max_steps
    cost = cost_of(config)
    macs = 2 * MOST_EXAMPLES * length * cost.macs(most_steps)
    if config.cluster.gpus_per_worker or macs > MOST_MACS or cost.macs(1) > MOST_WEIGHTS:
        return None
    return _timed(config), "one rank alone, timed here"


def _recent_step_ms(metrics: Path) -> list[float]:
    if not metrics.is_file():
        return []
    found = []
    for line in metrics.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line).get("perf/step_ms"))
        except (ValueError, AttributeError):  # a line that a crash has cut off
            continue
    return [value for value in found if value is not None][-RECENT_ROWS:]


def _timed(config: Config) -> float:
    # NOTE: torch takes 1.5 s to import, which a run whose metrics are known need not wait for.
    import torch

    from distcond.ops import use_kernels
    from distcond.train.learner import learner_for

    shape = shape_of(config.data)
    torch.set_num_threads(min(max(1, int(config.cluster.cpus_per_worker)), os.cpu_count() or 1))
    use_kernels(config.cluster.kernels.value)
    learner = learner_for(config, shape)
    size = micro_batch_size(config)
    number = min(size, MOST_EXAMPLES)
    if shape.kind == "bytes":
        batch = _noise(number, shape.max_length, shape.input_size)
    else:
        batch = build_task(config.data).rows(0, 0, number, slice(0, number))
    inputs = [torch.from_numpy(array) for array in (batch.inputs, batch.targets, batch.lengths)]
    seconds = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        learner(*inputs)[0].backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds) * size / number * config.optim.accumulation


def _noise(number: int, length: int, vocabulary: int) -> Batch:
    """Bytes or tokens without meaning, for no text is opened."""
    text = np.random.default_rng(0).integers(0, vocabulary, (number, length + 1), dtype=np.int32)
    return Batch(text[:, :-1], text[:, 1:], np.full(number, length), number * length)
