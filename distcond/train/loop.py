"""The training loop, read from top to bottom.

Every rank runs it. What may wait on other ranks is called equally often by all of them.
"""

import importlib.metadata
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distcond.config import Config
from distcond.data.batches import Feeder
from distcond.data.tasks import Task, build_task, bytes_per_token
from distcond.errors import TrainingError
from distcond.nn.model import SUMS
from distcond.ops import kernels
from distcond.tracking import Tracker, wandb_run
from distcond.train.health import first_bad_tensor
from distcond.train.hooks import LONGEST_WAIT_S, CheckpointHook, LogHook, ProfileHook, StopHook, ValidationHook, peak_tflops
from distcond.train.learner import cost_for
from distcond.train.run_folder import RunFolder, write_json
from distcond.train.schedule import learning_rate
from distcond.train.state import Hook, Run, start_run, tensors

log = logging.getLogger(__name__)

NOTHING = -1
"The step after which a run that begins has rows to take back: its first may be of step 0."


def run_training(
    config: Config, folder: RunFolder, feeder: Feeder, settings: dict[str, Any], note: Callable[[str], None] = log.warning
) -> dict[str, Any]:
    """Train until train.max_steps, or until RUN/stop appears; continue from the newest checkpoint. Returns the summary.

    A run whose steps are bad (no finite loss or gradient) `train.max_bad_steps` times in a row goes back to its newest
    checkpoint; where it does not get any further then, TrainingError names the first tensor that is not finite.
    settings: the configuration as plain containers, for the tracker. note: told what the user should know, by rank 0.
    """
    task = build_task(config.data)
    went_back_at = -1
    while True:
        run = start_run(config, folder, feeder, task, note)
        start = run.step
        try:
            if train(run, make_hooks(run, task, settings)):
                return run.summary
            run.writer.settle(LONGEST_WAIT_S)
        finally:
            run.writer.close()
        has_checkpoint = start > 0 or run.writer.newest is not None
        if not has_checkpoint or run.step <= went_back_at:
            raise TrainingError(
                f"no finite loss or gradient in steps {run.step - run.bad_steps} to {run.step - 1}; not finite first, in batch "
                f"{run.step - 1}: {first_bad_tensor(run)}. Lower optim.lr, or look at that batch."
            )
        if run.engine.tables.world.rank == 0:
            note(f"No finite loss or gradient in {run.bad_steps} steps up to {run.step - 1}: going back to the last checkpoint.")
        went_back_at = run.step
        run.engine.close()
        del run


def train(run: Run, hooks: Sequence[Hook]) -> bool:
    """Step by step to the end; False where that is out of sight, for too many steps in a row were bad."""
    try:
        if run.step == 0 and run.config.train.init_from:
            validate_now(run, hooks)  # what the weights it starts from are worth
            run.summary["stopped"] = run.stop
        if run.is_complete and run.summary.get("stopped"):  # in its last validation, or train.max_steps was lowered since
            if not run.is_validated:
                validate_now(run, hooks)
            run.summary["stopped"] = not run.is_validated
            if run.engine.tables.world.rank == 0:
                write_json(run.folder.summary_file, run.summary)
        while not run.is_last:
            train_step(run)
            if run.bad_steps >= run.config.train.max_bad_steps:
                return False
            for hook in hooks:
                hook.after_step(run)
    finally:
        for hook in reversed(hooks):
            hook.close()
    return True


def validate_now(run: Run, hooks: Sequence[Hook]) -> None:
    """A validation that follows no step."""
    for hook in hooks:
        if isinstance(hook, ValidationHook):
            hook.after_step(run)


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
        sums = sums.cpu()
        step_sums += sums
        if not bool(torch.isfinite(sums).all()):
            loss = loss * math.nan  # whatever its gradient would have been: no rank applies this step
        # DeepSpeed divides by ranks and micro-batches; the loss is a sum over the count of the whole batch.
        run.engine.backward(loss * (run.engine.tables.world.size * accumulation / batch.global_count))
        run.engine.step(lr)
    if run.budget is not None and run.engine.step_is_applied:
        spend(run, step_sums, lr)
    if bool(torch.isfinite(step_sums).all()):
        run.meter.sums += step_sums
    run.step += 1
    run.updates += run.engine.step_is_applied
    run.bad_steps = 0 if run.engine.step_is_applied else run.bad_steps + 1
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
        wandb = wandb_run(folder.path, config.tracking, settings)
        tracker = Tracker(folder.path, wandb, config.tracking.mode.value, run.step or NOTHING, run.note)
    cost = cost_for(config.model, task, run.learner.body)
    hooks: list[Hook] = [
        StopHook(),
        LogHook(tracker, cost, peak_tflops(config.train), bytes_per_token(task, "train")),
        ValidationHook(tracker, bytes_per_token(task, "validation")),
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
