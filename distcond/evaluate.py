"""`distcond evaluate RUN`: a checkpoint measured in this process, without Ray or DeepSpeed."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distcond.bench.timing import time_in_turn
from distcond.compose import load_config
from distcond.config import Config, HaltingKind
from distcond.data.batches import LocalFeeder, num_validation_batches
from distcond.data.generated import GeneratedTask
from distcond.data.places import PLACES, places_of
from distcond.errors import ConfigError, RunError
from distcond.nn.model import SUMS, Learner
from distcond.ops import kernels, use_kernels
from distcond.train.checkpoint import latest_checkpoint, read_dense, read_state, verified
from distcond.train.fits import cost_of
from distcond.train.learner import learner_for
from distcond.train.metrics import ponder, quality
from distcond.train.run_folder import RunFolder, write_json
from distcond.train.state import tensors
from distcond.train.table_files import load_tables

LATENCY_REPEATS = 20
"Single examples timed, after one that warms up."


def evaluate(run: Path, step: int | None = None) -> dict[str, Any]:
    """Quality on the validation set, ponder steps, MACs and latency of a run; also written to RUN/eval/step_<N>.json.

    Under halting also mean steps by what an element has more or less of (gates, digits); of bytes, mean steps and bits by the
    place of the byte that is predicted, see `places_of`.

    step: which checkpoint; None: the newest. Raises RunError where there is no run or no such checkpoint.
    """
    folder = RunFolder(run)
    if not folder.config_file.exists():
        raise RunError(f"{run} is not a run folder (no config.yaml); give the folder of a run, e.g. runs/NAME.")
    config = load_config(folder.config_file)
    checkpoint = _checkpoint(folder, step)
    feeder = LocalFeeder(config, rank=0, world_size=1)
    _choose_kernels(config)
    learner = load_learner(checkpoint, config, feeder)
    sums = _validation_sums(learner, config, feeder)
    steps = ponder(sums, "val/ponder")
    result = {
        "step": read_state(checkpoint)["step"],
        **quality(sums, is_text=learner.is_text, prefix="val"),
        **steps,
        "macs_per_position": cost_of(config).macs(steps["val/ponder/steps"]),
        "latency_ms": _latency_ms(learner, feeder),
        "kernels": kernels(),
    }
    if config.model.halting.kind != HaltingKind.none:
        result |= _by_place(learner, config, feeder) if learner.is_text else _by_measure(learner, config, feeder)
    (folder.path / "eval").mkdir(exist_ok=True)
    write_json(folder.path / "eval" / f"step_{result['step']:08d}.json", result)
    return result


def _choose_kernels(config: Config) -> None:
    """Those of the run, or torch's where this machine cannot compile them: figures are the same then, latency is not."""
    try:
        use_kernels(config.cluster.kernels.value)
    except ConfigError:
        use_kernels("torch")


def load_learner(checkpoint: Path, config: Config, feeder: LocalFeeder) -> Learner:
    """The model of a checkpoint, whole, in evaluation mode."""
    task = feeder.task
    learner = learner_for(config.model, task)
    dense = read_dense(checkpoint, learner)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.copy_(dense[f"{name}/weight"])
    load_tables(checkpoint, learner)
    return learner.eval()


def _checkpoint(folder: RunFolder, step: int | None) -> Path:
    if step is not None:
        chosen = folder.checkpoints / f"step_{step:08d}"
        if chosen.is_dir():
            return verified(chosen)
        held = ", ".join(str(int(path.name[5:])) for path in sorted(folder.checkpoints.glob("step_*"))) or "none"
        raise RunError(f"{folder.path} has no checkpoint of step {step}; it has: {held}.")
    newest = latest_checkpoint(folder.checkpoints)
    if newest is None:
        raise RunError(f"{folder.path} has no checkpoint yet; train it first: distcond train run.name={folder.path.name}")
    return newest


@torch.no_grad()
def _validation_sums(learner: Learner, config: Config, feeder: LocalFeeder) -> Tensor:
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    for index in range(num_validation_batches(config, 1)):
        _, sums = learner(*tensors(feeder.validation(index), torch.device("cpu")))
        total += sums
    return total


@torch.no_grad()
def _by_place(learner: Learner, config: Config, feeder: LocalFeeder) -> dict[str, float]:
    """Share of the bytes (%), mean executed steps and bits a byte by place; what there is none of is left out."""
    totals = torch.zeros(3, len(PLACES), dtype=torch.float64)
    for index in range(num_validation_batches(config, 1)):
        inputs, targets, lengths = tensors(feeder.validation(index), torch.device("cpu"))
        place = torch.from_numpy(places_of(torch.cat([inputs[:, :1], targets], dim=1).numpy())).flatten()
        logits, stats = learner.body(inputs, lengths)
        nats = cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long(), reduction="none")
        valid = (torch.arange(targets.shape[1]) < lengths[:, None]).flatten()
        for total, figure in zip(totals, (torch.ones_like(nats), stats.steps, nats / math.log(2)), strict=True):
            total.index_add_(0, place[valid], figure[valid].double())
    count = totals[0].clamp(min=1)
    figures = {"pct": 100 * totals[0] / totals[0].sum(), "steps": totals[1] / count, "bits": totals[2] / count}
    return {
        f"val/{place.replace(' ', '_')}/{name}": float(values[number])
        for number, place in enumerate(PLACES)
        for name, values in figures.items()
        if totals[0, number]
    }


@torch.no_grad()
def _by_measure(learner: Learner, config: Config, feeder: LocalFeeder) -> dict[str, float]:
    """Mean executed steps of the elements that have so many gates, digits or set bits."""
    task = feeder.task
    if not isinstance(task, GeneratedTask) or not task.measure:
        return {}
    parts = []
    for index in range(num_validation_batches(config, 1)):
        inputs, _, lengths = tensors(feeder.validation(index), torch.device("cpu"))
        valid_BT = torch.arange(inputs.shape[1]) < lengths[:, None]
        _, stats = learner.body(inputs, lengths)
        amount = torch.from_numpy(task.measured(inputs.numpy()))
        parts.append(torch.stack([amount[valid_BT], stats.steps.view_as(valid_BT)[valid_BT]]))
    amounts, steps = torch.cat(parts, dim=1)
    return {
        f"val/{task.measure}_{amount:02d}/steps": float(steps[amounts == amount].double().mean())
        for amount in amounts.unique().tolist()
    }


@torch.no_grad()
def _latency_ms(learner: Learner, feeder: LocalFeeder) -> float:
    """Median milliseconds of one validation example on its own."""
    example = [part[:1] for part in tensors(feeder.validation(0), torch.device("cpu"))]
    return time_in_turn({"example": lambda: learner(*example)}, LATENCY_REPEATS)["example"].median
