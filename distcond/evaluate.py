"""`distcond evaluate RUN`: a checkpoint measured in this process, without Ray or DeepSpeed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distcond.bench.timing import time_in_turn
from distcond.config import Config, HaltingKind
from distcond.data.batch import Batch
from distcond.data.batches import LocalFeeder, num_validation_batches
from distcond.data.generated import GeneratedTask
from distcond.data.places import PLACES, places_of
from distcond.data.tasks import Task, TextTask, bytes_per_token
from distcond.nn.halting import PonderStats
from distcond.nn.model import SUMS, Learner
from distcond.opened import open_run
from distcond.ops import kernels
from distcond.train.fits import cost_of
from distcond.train.metrics import ponder, quality
from distcond.train.run_folder import write_json
from distcond.train.state import tensors

LATENCY_REPEATS = 20
"Single examples timed, after one that warms up."


def evaluate(run: Path, step: int | None = None) -> dict[str, Any]:
    """Quality on the validation set, ponder steps, MACs and latency of a run; also written to RUN/eval/step_<N>.json.

    Under halting also mean steps by what an element has more or less of (gates, digits); of bytes, mean steps and bits by the
    place of the byte that is predicted, see `places_of`.

    step: which checkpoint; None: the newest. Raises RunError where there is no run or no such checkpoint.
    """
    opened = open_run(run, step)
    folder, config, feeder, learner = opened.folder, opened.config, opened.feeder, opened.learner
    sums, by_group = _validate(learner, config, feeder)
    steps = ponder(sums, "val/ponder")
    result = {
        "step": opened.step,
        **quality(sums, is_text=learner.is_text, prefix="val", bytes_per_token=bytes_per_token(feeder.task, "validation")),
        **steps,
        "macs_per_position": cost_of(config).macs(steps["val/ponder/steps"]),
        "latency_ms": _latency_ms(learner, feeder),
        "kernels": kernels(),
        **by_group,
    }
    (folder.path / "eval").mkdir(exist_ok=True)
    write_json(folder.path / "eval" / f"step_{result['step']:08d}.json", result)
    return result


@torch.no_grad()
def _validate(learner: Learner, config: Config, feeder: LocalFeeder) -> tuple[Tensor, dict[str, float]]:
    """The sums of the validation set; under halting also its figures by group: mean steps, of bytes share (%) and bits too."""
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    names, group_of = _groups(feeder.task) if config.model.halting.kind != HaltingKind.none else ([], None)
    counts, steps, bits = by_group = torch.zeros(3, len(names), dtype=torch.float64)
    outputs: list[tuple[Tensor, PonderStats]] = []
    hook = learner.body.register_forward_hook(lambda module, given, output: outputs.append(output))
    for index in range(num_validation_batches(config, 1)):
        batch = feeder.validation(index)
        inputs, targets, lengths = tensors(batch, torch.device("cpu"))
        total += learner(inputs, targets, lengths)[1]
        logits, stats = outputs.pop()
        if group_of is not None:
            valid = (torch.arange(inputs.shape[1]) < lengths[:, None]).flatten()
            figures = torch.stack([torch.ones_like(stats.remainder), stats.steps, torch.zeros_like(stats.remainder)]).double()
            if learner.is_text:
                figures[2] = cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long(), reduction="none") / math.log(2)
            by_group.index_add_(1, torch.from_numpy(group_of(batch)).flatten()[valid], figures[:, valid])
    hook.remove()
    means = {"pct": 100 * counts / counts.sum(), "steps": steps / counts, "bits": bits / counts}
    kinds = means if learner.is_text else ["steps"]
    groups = [number for number in range(len(names)) if counts[number]]
    return total, {f"val/{names[number]}/{kind}": float(means[kind][number]) for number in groups for kind in kinds}


def _groups(task: Task) -> tuple[list[str], Callable[[Batch], np.ndarray] | None]:
    """Names of what the elements of a task are told apart by, and the index of each one's: int64 [B, T]; None: by nothing."""
    if isinstance(task, TextTask) and task.unit == "bytes":
        names = [place.replace(" ", "_") for place in PLACES]
        return names, lambda batch: places_of(np.concatenate([batch.inputs[:, :1], batch.targets], axis=1))
    if isinstance(task, GeneratedTask) and task.measure:
        return [f"{task.measure}_{amount:02d}" for amount in range(task.input_size + 1)], lambda batch: task.measured(
            batch.inputs
        )
    return [], None


@torch.no_grad()
def _latency_ms(learner: Learner, feeder: LocalFeeder) -> float:
    """Median milliseconds of one validation example on its own."""
    example = [part[:1] for part in tensors(feeder.validation(0), torch.device("cpu"))]
    return time_in_turn({"example": lambda: learner(*example)}, LATENCY_REPEATS)["example"].median
