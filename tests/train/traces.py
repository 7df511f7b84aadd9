"""What a few steps of training leave behind, in a form that runs on different ranks can be compared by."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distcond.config import Config
from distcond.data.batch import Batch, select
from distcond.data.batches import LocalFeeder
from distcond.data.tasks import Task
from distcond.nn import AdaptiveComputation, TreeLinear
from distcond.nn.gates import Gate
from distcond.nn.model import SUMS, Learner
from distcond.optim.row_adam import add_state
from distcond.train.learner import learner_for
from tests.helpers import changed
from tests.trees import seed_cpu

MARGIN = 1e-5
"""Least distance of a gate from zero and of a halting sum from its threshold: a hundred times the rounding that ranks
differ by, so that no bit and no number of steps depends on it; a flip would be a difference that is no mistake."""

Change = Callable[[Batch, int], Batch]


@dataclass(slots=True)
class Case:
    """A few steps of training. change: of the global batch of a step; prepare: of the fresh model."""

    config: Config
    change: Change | None = None
    prepare: Callable[[Learner], None] | None = None


@dataclass(slots=True)
class Trace:
    """What training left behind on one rank, or on all of them together."""

    figures: list[list[float]] = field(default_factory=list)
    "Per step, the figures of SUMS over all ranks."
    norms: list[float] = field(default_factory=list)
    "Per step, the joint gradient norm before clipping."
    applied: list[bool] = field(default_factory=list)
    dense: dict[str, Tensor] = field(default_factory=dict)
    "Ordinary parameters and, under `buffers/`, the gates' statistics, by name."
    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    "By `layer/kind/part`, rows and optimiser state of each node."
    margin: float = float("inf")


class ChangedTask:
    """A task whose global batches are changed, as a whole and hence alike for every number of ranks."""

    def __init__(self, task: Task, change: Change) -> None:
        self.task, self.change = task, change
        self.kind, self.max_length = task.kind, task.max_length

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        return select(self.change(self.task.rows(seed, step, size), step), part)


class MarginWatch:
    """Follows how close gates come to zero and halting sums to their threshold."""

    def __init__(self, model: nn.Module) -> None:
        self.margin = float("inf")
        for module in model.modules():
            if isinstance(module, Gate):
                module.register_forward_hook(self._note_gate)
            if isinstance(module, AdaptiveComputation):
                _HaltingWatch(module, self._note)

    def _note_gate(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._note(output.detach())

    def _note(self, distance: Tensor) -> None:
        finite = distance[distance.isfinite()]
        if len(finite):
            self.margin = min(self.margin, float(finite.abs().min()))


class _HaltingWatch:
    """Repeats the halting sums of one module from outside: the cell is told the rows, the halting unit answers."""

    def __init__(self, module: AdaptiveComputation, note: Callable[[Tensor], None]) -> None:
        self.threshold, self.note, self.sums = 1.0 - module.epsilon, note, torch.zeros(0)
        assert isinstance(module.cell, nn.Module)
        module.register_forward_pre_hook(self._start)
        module.cell.register_forward_pre_hook(self._rows)
        module.halting.register_forward_hook(self._add)

    def _start(self, module: nn.Module, inputs: tuple[Tensor, Any]) -> None:
        self.sums = torch.zeros(len(inputs[0]))

    def _rows(self, module: nn.Module, inputs: tuple[Tensor, Any, Tensor]) -> None:
        self.rows = inputs[2]

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.sums = self.sums.index_add(0, self.rows, output.detach())
        self.note(self.sums[self.rows] - self.threshold)


def on_ranks(case: Case, number: int) -> Config:
    """The configuration of a case for this many ranks; placements for another number are left out."""
    size = case.config.cluster.expert_parallel_size
    fits = size is None or number % size == 0
    config: Config = changed(case.config, cluster__num_workers=number, cluster__expert_parallel_size=size if fits else None)
    return config


def make_learner(case: Case, task: Task) -> Learner:
    """The fresh model of a case, the same on every rank."""
    config = case.config
    seed_cpu(config.seed)
    learner = learner_for(config, task)
    if case.prepare:
        case.prepare(learner)
    return learner


def make_feeder(case: Case, config: Config, rank: int) -> LocalFeeder:
    """What hands this rank the changed batches of a case."""
    feeder = LocalFeeder(config, rank, config.cluster.num_workers)
    if case.change:
        feeder.task = ChangedTask(feeder.task, case.change)  # type: ignore[assignment]
    return feeder


def train_cases(cases: list[Case], num_steps: int) -> list[Trace]:
    """Train each case with an engine of its own in this process, a rank of a group."""
    return [train_case(case, num_steps) for case in cases]


def train_case(case: Case, num_steps: int) -> Trace:
    """Train with the engine and the loop's own step; a rank's trace."""
    from distcond.train.engine import Engine
    from distcond.train.loop import train_step
    from distcond.train.run_folder import RunFolder
    from distcond.train.state import Run

    config = on_ranks(case, dist.get_world_size())
    feeder = make_feeder(case, config, dist.get_rank())
    learner = make_learner(case, LocalFeeder(config, 0, 1).task)
    watch = MarginWatch(learner)
    run = Run(config, RunFolder(Path(config.run.dir)), feeder, Engine(learner, config), learner)
    trace = Trace()
    for _ in range(num_steps):
        train_step(run)
        sums = run.engine.tables.world.sum_(run.meter.sums).tolist()
        run.meter.sums.zero_()
        if run.engine.step_is_applied:  # else some of the ranks leave theirs out
            trace.figures.append(sums)
        trace.norms.append(run.engine.grad_norm)
        trace.applied.append(run.engine.step_is_applied)
    weights = {key: value for key, value in run.engine.dense_state().items() if key.endswith("/weight")}
    trace.dense = {key.removesuffix("/weight"): value for key, value in weights.items()} | buffers(learner)
    trace.rows, trace.margin = rows_by_node(learner), watch.margin
    return trace


def train_plainly(case: Case, num_steps: int) -> Trace:
    """The same steps in this process with torch alone: the reference, which knows neither ranks nor DeepSpeed."""
    from distcond.optim import RowAdam

    config = on_ranks(case, 1)
    feeder = make_feeder(case, config, 0)
    optim, learner = config.optim, make_learner(case, LocalFeeder(config, 0, 1).task)
    rows = RowAdam(learner, optim.lr, tuple(optim.betas), optim.eps, optim.weight_decay)
    adam = torch.optim.AdamW(learner.parameters(), optim.lr, tuple(optim.betas), optim.eps, weight_decay=optim.weight_decay)
    trace, watch = Trace(), MarginWatch(learner)
    for step in range(num_steps):
        adam.zero_grad()
        figures = torch.zeros(len(SUMS), dtype=torch.float64)
        for micro in range(optim.accumulation):
            batch = feeder.get(step, micro)
            loss, sums = learner(*(torch.tensor(array) for array in (batch.inputs, batch.targets, batch.lengths)))
            (loss / batch.global_count).backward()
            figures += sums
        gradients = [(store, *store.take_gradient()) for store in rows.stores()]
        dense = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
        squares = [grad.double().square().sum() for grad in (*dense, *(grad for _, _, grad in gradients))]
        norm = float(sum(squares)) ** 0.5
        trace.norms.append(norm if math.isfinite(norm) else math.inf)
        trace.applied.append(math.isfinite(norm))
        if not trace.applied[-1]:
            rows.zero_grad()
            for layer in rows.layers:
                layer.gate.take_statistics()
            continue
        trace.figures.append(figures.tolist())
        scale = min(1.0, optim.grad_clip / norm) if optim.grad_clip else 1.0
        for grad in dense:
            grad.mul_(scale)
        adam.step()
        rows.step_rows([(store, touched, grad * scale) for store, touched, grad in gradients])
        for table in rows.tables():
            table.settle(None)
        for layer in rows.layers:
            layer.commit_statistics()
    trace.dense = {name: parameter.detach() for name, parameter in learner.named_parameters()} | buffers(learner)
    trace.rows, trace.margin = rows_by_node(learner), watch.margin
    return trace


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Statistics of the gates and seeds of the tables, by name."""
    return {f"buffers/{name}": value.clone() for name, value in model.named_buffers()}


def rows_by_node(model: nn.Module) -> dict[str, dict[int, Tensor]]:
    """Rows and optimiser state of all nodes that this rank holds."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, TreeLinear) or layer.table is None:
            continue
        for kind, store in layer.table.stores():
            add_state(store)
            for part, values in {"rows": store.data, **store.state}.items():
                pairs = zip(store.keys.tolist(), values.clone(), strict=True)
                found[f"{name}/{kind}/{part}"] = dict(pairs)
    return found


def join(ranks: list[Trace]) -> Trace:
    """One trace of all ranks; what several of them hold must be the same to the last bit."""
    first = ranks[0]
    joined = Trace(first.figures, first.norms, first.applied, first.dense, {}, min(rank.margin for rank in ranks))
    for rank in ranks:
        for mine, theirs in ((rank.figures, first.figures), (rank.norms, first.norms), (rank.applied, first.applied)):
            assert str(mine) == str(theirs), "ranks report different figures"  # as text, in which nan equals nan
        for name, value in rank.dense.items():
            assert torch.equal(value, first.dense[name]), f"ranks hold different values of {name}"
        for part, nodes in rank.rows.items():
            known = joined.rows.setdefault(part, {})
            for node, value in nodes.items():
                assert torch.equal(value, known.setdefault(node, value)), f"ranks hold different {part} of node {node}"
    return joined


def assert_same(trace: Trace, reference: Trace, tolerance: float) -> None:
    """The same steps, up to rounding: figures and norms relative to their size, parameters and rows absolutely."""
    assert min(trace.margin, reference.margin) > MARGIN, "a gate or a halting sum is too close to its threshold; change the seed"
    assert trace.applied == reference.applied
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(
        torch.tensor(trace.figures, dtype=torch.float64), torch.tensor(reference.figures, dtype=torch.float64), **close
    )
    torch.testing.assert_close(torch.tensor(trace.norms), torch.tensor(reference.norms), **close)
    assert trace.dense.keys() == reference.dense.keys()
    for name, value in trace.dense.items():
        torch.testing.assert_close(value, reference.dense[name], **close, msg=lambda text, name=name: f"{name}: {text}")
    assert trace.rows.keys() == reference.rows.keys()
    for part, nodes in trace.rows.items():
        assert nodes.keys() == reference.rows[part].keys(), f"{part}: other nodes exist"
        mine, theirs = (torch.stack([held[node] for node in sorted(held)]) for held in (nodes, reference.rows[part]))
        torch.testing.assert_close(mine, theirs, **close, msg=lambda text, part=part: f"{part}: {text}")
