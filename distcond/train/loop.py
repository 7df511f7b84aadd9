"""The training loop, read from top to bottom.

Every rank runs it. What may wait on other ranks is called equally often by all of them.
"""

import hashlib
import importlib.metadata
import platform
import sys
import time
from typing import Any

import torch
from torch import Tensor

from distcond.config import Config
from distcond.config.cost import model_cost
from distcond.data.batches import Feeder
from distcond.data.tasks import Task, build_task
from distcond.nn.model import SUMS
from distcond.ops import kernels
from distcond.tracking import Tracker
from distcond.train.hooks import CheckpointHook, LogHook, ProfileHook, StopHook, ValidationHook, peak_tflops
from distcond.train.run_folder import RunFolder, write_json
from distcond.train.schedule import learning_rate
from distcond.train.state import Hook, Run, start_run, tensors


def run_training(config: Config, folder: RunFolder, feeder: Feeder, settings: dict[str, Any]) -> dict[str, Any]:
    """Train until train.max_steps, or until RUN/stop appears; continue from the newest checkpoint. Returns the summary.

    settings: the configuration as plain containers, for the tracker.
    """
    task = build_task(config.data)
    run = start_run(config, folder, feeder, task)
    hooks = make_hooks(run, task, settings)
    try:
        while not run.is_last:
            train_step(run)
            for hook in hooks:
                hook.after_step(run)
    finally:
        for hook in reversed(hooks):
            hook.close()
    return run.summary


def train_step(run: Run) -> None:
    """One optimiser step: every micro-batch forward and backward, then the update of the dense part and the tables."""
    accumulation = run.config.optim.accumulation
    lr = learning_rate(run.config.optim, run.step, run.config.train.max_steps)
    step_sums = torch.zeros(len(SUMS), dtype=torch.float64)
    for micro in range(accumulation):
        start = time.perf_counter()
        batch = run.feeder.get(run.step, micro)
        run.meter.data_wait_s += time.perf_counter() - start
        loss, sums = run.engine(*tensors(batch, run.engine.device))
        step_sums += sums.cpu()
        # DeepSpeed divides by ranks and micro-batches; the loss is a sum over the count of the whole batch.
        run.engine.backward(loss * (run.engine.tables.world.size * accumulation / batch.global_count))
        run.engine.step(lr)
    if run.budget is not None and run.engine.step_is_applied:
        spend(run, step_sums, lr)
    run.meter.sums += step_sums
    run.step += 1
    run.updates += run.engine.step_is_applied
    run.meter.steps += 1
    run.meter.skipped += not run.engine.step_is_applied


def spend(run: Run, sums: Tensor, lr: float) -> None:
    """Tell the budget of ponder steps what this step's whole batch took; what it answers weighs the next one."""
    assert run.budget is not None
    figure = dict(zip(SUMS, run.engine.tables.world.sum_(sums.clone()).tolist(), strict=True))
    run.budget.commit(figure["ponder_steps"] / figure["positions"], figure["nll"] / figure["positions"], lr)
    run.learner.time_penalty = run.budget.penalty


def make_hooks(run: Run, task: Task, settings: dict[str, Any]) -> list[Hook]:
    """What happens beside training, in this order after each step; rank 0 tracks."""
    config, folder, tracker = run.config, run.folder, None
    if run.engine.tables.world.rank == 0:
        write_json(folder.environment_file, environment(task))
        tracking, name = config.tracking, folder.path.name
        # Runs of the same name in other folders, e.g. trials of two sweeps, are other runs.
        run_id = f"{name}-{hashlib.sha256(str(folder.path).encode()).hexdigest()[:8]}"
        tracker = Tracker(folder.path, settings, tracking.mode.value, tracking.project, tracking.group, name, run_id, run.step)
    sizes = {"input_size": task.input_size, "output_size": task.output_size, "length": task.max_length}
    cost = model_cost(config.model, is_text=task.kind == "bytes", **sizes)
    hooks: list[Hook] = [
        StopHook(),
        LogHook(tracker, cost, peak_tflops(config.train)),
        ValidationHook(tracker),
        CheckpointHook(),
    ]
    return [ProfileHook(), *hooks] if config.train.profile else hooks


def environment(task: Task) -> dict[str, Any]:
    """What a result depends on beside the configuration: versions, machine, data."""
    names = ("distcond", "torch", "deepspeed", "ray", "numpy")
    return {
        "python": sys.version.split()[0],
        "machine": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "cuda": torch.version.cuda,
        "kernels": kernels(),
        "data": task.fingerprint(),
    }
