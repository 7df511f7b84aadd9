"""A run while it trains: what the loop changes and the hooks see."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distcond.config import Config
from distcond.data.batches import Batch, Feeder, num_validation_batches
from distcond.data.tasks import Task
from distcond.errors import RunError
from distcond.nn.budget import StepBudget
from distcond.nn.model import SUMS, Learner
from distcond.ops import use_kernels
from distcond.table import Collective
from distcond.train.checkpoint import newest_checkpoint, passed_over, read_dense, read_state, set_aside
from distcond.train.checkpoint_writer import CheckpointWriter, name_of
from distcond.train.engine import Engine
from distcond.train.grow import start_from
from distcond.train.learner import learner_for
from distcond.train.metrics import Meter
from distcond.train.run_folder import RunFolder, is_there
from distcond.train.sealer import wait_for_orphans
from distcond.train.table_files import load_tables, tree_layers
from distcond.train.tree_use import TreeUse

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
"For a validation to end that somebody waits for who asks for a stop; one that takes longer is left out."


@dataclass(slots=True)
class Run:
    """A run while it trains: what hooks see."""

    config: Config
    folder: RunFolder
    feeder: Feeder
    engine: Engine
    learner: Learner
    note: Callable[[str], None] = log.warning
    "Tells the user a line; rank 0 alone does."
    writer: CheckpointWriter = field(init=False)
    step: int = 0
    "Steps done."
    updates: int = 0
    "Steps that changed the weights."
    bad_steps: int = 0
    "Steps in a row, up to now, that did not."
    meter: Meter = field(default_factory=Meter)
    summary: dict[str, Any] = field(default_factory=dict)
    validation: tuple[int, float] | None = None
    "Step and figure of the last validation."
    budget: StepBudget | None = None
    "What sets the learner's penalty, where the run has target_steps."
    stop: bool = False
    tree_use: TreeUse = field(default_factory=TreeUse)
    "What the tokens of the training steps since the last validation went through, up to the last row of metrics."

    def __post_init__(self) -> None:
        self.writer = CheckpointWriter(self.folder.checkpoints, self.engine.tables, self.config.checkpoint, self.note)

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.train.max_steps

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.stop or self.is_complete

    @property
    def is_validated(self) -> bool:
        """Whether the figure of this step is there."""
        return self.validation is not None and self.validation[0] == self.step


class Hook(Protocol):
    """Something that happens beside training. Hooks run in order, on every rank."""

    def after_step(self, run: Run) -> None:
        """Called after every step; `run.step` counts it."""
        ...

    def close(self) -> None:
        """Called once, however training ends."""
        ...


def start_run(config: Config, folder: RunFolder, feeder: Feeder, task: Task, note: Callable[[str], None] = log.warning) -> Run:
    """A fresh run, or the one that the newest intact checkpoint holds. Collective."""
    torch.manual_seed(config.seed)
    use_kernels(config.cluster.kernels.value)
    learner = learner_for(config, task)
    target = config.model.halting.target_steps
    budget = None if target is None else StepBudget(target)
    checkpoint = _agreed_checkpoint(folder.checkpoints, note)
    done: dict[str, Any] = {}
    if checkpoint is None:
        if config.train.init_from:
            done = {"summary": {"init_from": _take_weights(learner, Path(config.train.init_from), note)}}
        engine = Engine(learner, config)
    else:
        state, dense = read_state(checkpoint), read_dense(checkpoint, learner)
        weights = {name: dense[f"{name}/weight"] for name, _ in learner.named_parameters()}
        engine = Engine(learner, config, weights)
        engine.load_dense_state(dense, state["updates"])
        expert = engine.tables.expert
        log_decay = load_tables(checkpoint, learner, rank=expert.rank, size=expert.size)
        engine.tables.optimizer.log_decay = log_decay
        done = {"step": state["step"], "updates": state["updates"], "summary": state["summary"]}
        if state["validation"] is not None:
            done["validation"] = (state["step"], state["validation"])
        if budget is not None:
            budget.load_state_dict(state["budget"])
            learner.time_penalty = budget.penalty
        log.info("Continuing %s from step %d.", folder.path, state["step"])
    for layer in tree_layers(learner).values():
        layer.records_loads = True
    learner.train()
    return Run(config, folder, feeder, engine, learner, note, budget=budget, **done)


def _take_weights(learner: Learner, parent: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Start a model from the newest intact checkpoint of another run; returns which one that is, for the summary. Collective."""
    folder = RunFolder(parent).checkpoints
    checkpoint = _agreed_checkpoint(folder, note, is_own=False)
    if checkpoint is None:
        raise RunError(f"train.init_from={parent} has no checkpoint to start from; train that run to its first one.")
    start_from(learner, checkpoint)
    step = int(read_state(checkpoint)["step"])
    log.info("Starting from %s at step %d.", parent, step)
    return {"run": str(parent), "step": step}


def _agreed_checkpoint(folder: Path, note: Callable[[str], None], *, is_own: bool = True) -> Path | None:
    """The checkpoint that rank 0 finds intact; the user is told of newer ones, which are set aside in an own run. Collective."""
    world = Collective()
    none, refused = -1, -2
    step = torch.tensor([none])
    error: RunError | None = None
    if world.rank == 0:
        if is_own:
            wait_for_orphans(folder)
        try:
            found, damaged = newest_checkpoint(folder)
        except RunError as reason:
            error, step[0] = reason, refused
        else:
            if found is not None:
                step[0] = int(found.name[len("step_") :])
                for path, why in damaged.items():
                    if is_own:
                        set_aside(path)
                    note(passed_over(why, int(step)))
    world.broadcast_(step)
    if step == refused:
        raise error or RunError(f"{folder} holds no checkpoint that is intact.")
    return None if step == none else folder / name_of(int(step))


@torch.no_grad()
def validate(run: Run) -> Tensor | None:
    """Figures of SUMS over the validation set and all ranks, float64; None where it is left out for a stop. Collective."""
    run.learner.eval()
    world, asked_at, is_left_out = run.engine.tables.world, None, False
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    for index in range(num_validation_batches(run.config, world.size)):
        batch = run.feeder.validation(index)
        _, sums = run.engine(*tensors(batch, run.engine.device))
        total += sums.cpu()
        if asked_at is None and is_there(run.folder.stop_file):
            asked_at = time.monotonic()
        is_left_out = run.writer.agree(asked_at is not None and time.monotonic() - asked_at >= PATIENCE_S)
        if is_left_out:
            break
    run.learner.train()
    run.stop = run.stop or is_left_out
    return None if is_left_out else world.sum_(total)


def tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and lengths of a batch on a device."""
    # NOTE: copies, because a batch out of Ray's object store is read-only memory.
    inputs, targets, lengths = (torch.tensor(array) for array in (batch.inputs, batch.targets, batch.lengths))
    return inputs.to(device), targets.to(device), lengths.to(device)
