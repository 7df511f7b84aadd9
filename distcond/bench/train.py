"""What a step of `distcond train` costs beside a plain PyTorch loop of the same model on the same batches."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from distcond.bench.report import Row
from distcond.bench.timing import time_in_turn
from distcond.compose import compose
from distcond.config import Config, OptimConfig
from distcond.data.batches import Batch, LocalFeeder
from distcond.nn.model import Learner
from distcond.optim import RowAdam
from distcond.train.learner import learner_for

QUICK = ["model=rnn", "data=parity", "model.width=16", "data.num_bits=8", "data.global_batch_size=8", "train.log_every=2"]


def bench_train(quick: bool = False) -> Iterator[Row]:
    """The default configuration, one worker, fp32: rounds of `train.log_every` steps of either, one after the other.

    Ours: the loop's step, the hooks that follow every step, one row of metrics a round. Theirs: forward, backward,
    clipping, torch's AdamW for the dense part and `RowAdam` for the rows. Reading data is left out of both:
    workers compute batches ahead. So are validations and checkpoints.
    """
    from distcond.train.run_folder import RunFolder

    config = compose(QUICK if quick else [], None)
    feeder = _Prepared(config)
    with tempfile.TemporaryDirectory() as folder:
        ours = _loop(config, feeder, RunFolder(Path(folder)))
        times = time_in_turn({"ours": ours, "plain": _plain_loop(config, feeder)})
    steps = config.train.log_every
    yield {
        "what": "a step of distcond train",
        "model": f"{config.model.name}, width {config.model.width}, depth {config.model.tree.depth}",
        "batch": config.data.global_batch_size,
        "ms": times["ours"].median / steps,
        "from": times["ours"].low / steps,
        "to": times["ours"].high / steps,
        "plain ms": times["plain"].median / steps,
        "ratio": times["ours"].median / times["plain"].median,
    }


class _Prepared:
    """A feeder whose batches are ready."""

    def __init__(self, config: Config) -> None:
        source = LocalFeeder(config, 0, 1)
        self.task = source.task
        self.batches = [source.get(step, 0) for step in range(config.train.log_every)]

    def get(self, step: int, micro: int) -> Batch:
        return self.batches[step % len(self.batches)]

    def validation(self, index: int) -> Batch:
        return self.batches[index]


def _loop(config: Config, feeder: _Prepared, folder: Any) -> Callable[[], None]:
    """A round of the loop's steps, in a run without a tracker."""
    from distcond.train.fits import cost_of
    from distcond.train.hooks import LogHook, StopHook, peak_tflops
    from distcond.train.loop import train_step
    from distcond.train.state import Hook, start_run

    run = start_run(config, folder, feeder, feeder.task)
    hooks: list[Hook] = [StopHook(), LogHook(None, cost_of(config), peak_tflops(config.train))]

    def steps() -> None:
        for _ in range(config.train.log_every):
            train_step(run)
            for hook in hooks:
                hook.after_step(run)

    return steps


def _plain_loop(config: Config, feeder: _Prepared) -> Callable[[], None]:
    """A round of steps as anyone would write them with torch, and rows for the tree."""
    torch.manual_seed(config.seed)
    task, optim = feeder.task, config.optim
    learner = learner_for(config, task)
    adam = torch.optim.AdamW(learner.parameters(), optim.lr, weight_decay=optim.weight_decay)
    rows = RowAdam(learner, optim.lr, weight_decay=optim.weight_decay)

    def steps() -> None:
        for step in range(config.train.log_every):
            batch = feeder.get(step, 0)
            loss, _ = learner(*(torch.from_numpy(array) for array in (batch.inputs, batch.targets, batch.lengths)))
            (loss / batch.global_count).backward()
            _update(learner, adam, rows, optim)
            learner.zero_grad()

    return steps


def _update(learner: Learner, adam: torch.optim.Optimizer, rows: RowAdam, optim: OptimConfig) -> None:
    """Clip dense gradients and rows by their joint norm, then update both."""
    taken = [(store, *store.take_gradient()) for store in rows.stores()]
    dense = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
    gradients = [*dense, *(grad for _, _, grad in taken)]
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = torch.clamp(optim.grad_clip / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(gradients, scale)
    adam.step()
    rows.step_rows(taken)
    for layer in rows.layers:
        layer.commit_statistics()
