"""A run while it trains: what the loop changes and the hooks see."""

import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from distcond.config import Config
from distcond.data.batches import Batch, Feeder, num_validation_batches
from distcond.data.tasks import Task
from distcond.nn.budget import StepBudget
from distcond.nn.model import SUMS, Learner
from distcond.ops import use_kernels
from distcond.train.checkpoint import latest_checkpoint, read_dense, read_state
from distcond.train.engine import Engine
from distcond.train.learner import learner_for
from distcond.train.metrics import Meter
from distcond.train.run_folder import RunFolder
from distcond.train.table_files import load_tables, tree_layers

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """A run while it trains: what hooks see."""

    config: Config
    folder: RunFolder
    feeder: Feeder
    engine: Engine
    learner: Learner
    step: int = 0
    "Steps done."
    updates: int = 0
    "Steps that changed the weights."
    meter: Meter = field(default_factory=Meter)
    summary: dict[str, Any] = field(default_factory=dict)
    budget: StepBudget | None = None
    "What sets the learner's penalty, where the run has target_steps."
    stop: bool = False

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.stop or self.step >= self.config.train.max_steps


class Hook(Protocol):
    """Something that happens beside training. Hooks run in order, on every rank."""

    def after_step(self, run: Run) -> None:
        """Called after every step; `run.step` counts it."""
        ...

    def close(self) -> None:
        """Called once, however training ends."""
        ...


def start_run(config: Config, folder: RunFolder, feeder: Feeder, task: Task) -> Run:
    """A fresh run, or the one that the newest checkpoint holds."""
    torch.manual_seed(config.seed)
    use_kernels(config.cluster.kernels.value)
    learner = learner_for(config.model, task)
    target = config.model.halting.target_steps
    budget = None if target is None else StepBudget(target)
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        run = Run(config, folder, feeder, Engine(learner, config), learner, budget=budget)
    else:
        state, dense = read_state(checkpoint), read_dense(checkpoint, learner)
        weights = {name: dense[f"{name}/weight"] for name, _ in learner.named_parameters()}
        engine = Engine(learner, config, weights)
        engine.load_dense_state(dense, state["updates"])
        expert = engine.tables.expert
        log_decay = load_tables(checkpoint, learner, rank=expert.rank, size=expert.size)
        engine.tables.optimizer.log_decay = log_decay
        done = {"step": state["step"], "updates": state["updates"], "summary": state["summary"]}
        run = Run(config, folder, feeder, engine, learner, **done, budget=budget)
        if run.budget is not None:
            run.budget.load_state_dict(state["budget"])
            learner.time_penalty = run.budget.penalty
        log.info("Continuing %s from step %d.", folder.path, run.step)
    for layer in tree_layers(learner).values():
        layer.records_loads = True
    learner.train()
    return run


@torch.no_grad()
def validate(run: Run) -> Tensor:
    """Figures of SUMS over the validation set and all ranks, float64."""
    run.learner.eval()
    world = run.engine.tables.world
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    for index in range(num_validation_batches(run.config, world.size)):
        batch = run.feeder.validation(index)
        _, sums = run.engine(*tensors(batch, run.engine.device))
        total += sums.cpu()
    run.learner.train()
    return world.sum_(total)


def tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and lengths of a batch on a device."""
    # NOTE: copies, because a batch out of Ray's object store is read-only memory.
    inputs, targets, lengths = (torch.tensor(array) for array in (batch.inputs, batch.targets, batch.lengths))
    return inputs.to(device), targets.to(device), lengths.to(device)
