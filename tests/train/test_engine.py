"""The engine: neither ranks, placement, ZeRO stage nor accumulation change a result; a step is applied everywhere or nowhere."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distcond.data.batch import Batch
from distcond.data.batches import LocalFeeder
from distcond.nn import TreeLinear
from distcond.nn.model import SUMS, Learner
from tests.helpers import asked_for, run_ranks, small_config, text_config
from tests.train.traces import (
    Case,
    Trace,
    assert_same,
    join,
    make_feeder,
    make_learner,
    on_ranks,
    train_cases,
    train_plainly,
)

STEPS = 3
FEW = 2  # where the matrix has shown that updates do not drift apart
# Single precision: sums over ranks and micro-batches are rounded in another order, 1e-7 of their size each time.
TOLERANCE = 1e-6
CLIP = 0.05
# Every two of stage, accumulation and clipping meet.
MATRIX = [(stage, times, CLIP if (stage + times) % 2 else 0.0) for stage in range(4) for times in (1, 2)]


def case(stage: int = 1, accumulation: int = 1, clip: float = CLIP, **changes: object) -> Case:
    options = {"optim__zero_stage": stage, "optim__accumulation": accumulation, "optim__grad_clip": clip}
    return Case(small_config("unused", **{"cluster__num_workers": 4, **options, **changes}))


def traces(world_size: int, cases: list[Case], num_steps: int = STEPS) -> list[Trace]:
    return [join(list(ranks)) for ranks in zip(*run_ranks(train_cases, world_size, cases, num_steps), strict=True)]


@cache
def plain(clip: float) -> Trace:
    return train_plainly(case(clip=clip), STEPS)


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest) -> dict[tuple[Any, ...], Trace]:
    asked = asked_for(request, "world_size", "stage", "accumulation", "clip")
    by_size = {size: [key for key in asked if key[0] == size] for size, *_ in asked}
    found = {size: traces(size, [case(*options) for _, *options in keys]) for size, keys in by_size.items()}
    return {key: trace for size, keys in by_size.items() for key, trace in zip(keys, found[size], strict=True)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("stage", "accumulation", "clip"), MATRIX)
def test_ranks_stages_and_accumulation_equal_plain_torch(
    matrix: dict[tuple[Any, ...], Trace], world_size: int, stage: int, accumulation: int, clip: float
) -> None:
    assert min(plain(clip).norms) > CLIP, "clipping has nothing to do"
    assert_same(matrix[world_size, stage, accumulation, clip], plain(clip), TOLERANCE)


# ---- what is not shared out evenly -------------------------------------------------------------------------------------


def root_weight(linear: nn.Module) -> Tensor:
    table = getattr(linear, "table", None)
    return table.tensors().weight_SPQ[0] if table is not None else linear.weight.detach()


def halt_by_first_entry(learner: Learner) -> None:
    """Rows whose first input is 1 halt at once, those where it is -1 never do so by themselves."""
    weight = root_weight(learner.body.ponder.cell.linear)
    weight[0] = 0.0
    weight[0, 0] = 5.0
    learner.body.ponder.halting.weight.data[0, 0] = 80.0
    learner.body.ponder.halting.bias.data.zero_()


def first_half_is_easy(batch: Batch, step: int) -> Batch:
    batch.inputs[:, :, 0] = np.where(np.arange(len(batch.inputs)) < len(batch.inputs) // 2, 1.0, -1.0)[:, None]
    return batch


def first_entry_opens_right_subtree(learner: Learner) -> None:
    weight = learner.body.ponder.cell.linear.gate.weight.data[0]
    weight.zero_()
    weight[0] = 3.0


def first_entry_grows(batch: Batch, step: int) -> Batch:
    """Above the running mean of the gate that reads it, at every step and in every row."""
    batch.inputs[:, :, 0] = 1.0 + step
    return batch


def second_half_is_empty(batch: Batch, step: int) -> Batch:
    half = len(batch.inputs) // 2
    batch.lengths[half:] = 0
    batch.inputs[half:], batch.targets[half:] = 0.0, 0.0
    return batch


def first_half_is_short(batch: Batch, step: int) -> Batch:
    batch.lengths[: len(batch.lengths) // 2] = 1
    return batch


def uneven(kind: str, stage: int, **changes: object) -> Case:
    logic = {"seed": 1, "data__name": "logic", "data__max_length": 4, "data__max_gates": 2}
    made = {
        "halting": case(stage, model__halting__max_steps=6, **changes),
        "subtree": case(stage, cluster__shard_level=1, **changes),
        "empty rank": case(stage, **changes),
        "ragged": case(stage, **logic, model__cell="lstm", **changes),
    }[kind]
    made.change, made.prepare = {
        "halting": (first_half_is_easy, halt_by_first_entry),
        "subtree": (first_entry_grows, first_entry_opens_right_subtree),
        "empty rank": (second_half_is_empty, None),
        "ragged": (first_half_is_short, None),
    }[kind]
    return made


CLASSES = {"data__name": "addition", "data__max_length": 3, "data__max_digits": 2}
FIXED = {"model__halting__kind": "fixed", "optim__weight_decay": 0.1}
UNEVEN = {
    **{f"{kind}, ZeRO 3": uneven(kind, 3) for kind in ("halting", "subtree", "empty rank", "ragged")},
    "halting, levels scaled by their gates, ZeRO 1": uneven("halting", 1, model__tree__gate_gradient="magnitude"),
    "empty rank, gates learn from flips, ZeRO 1": uneven("empty rank", 1, model__tree__gate_gradient="flip_sampled"),
    "halting, no tables, ZeRO 3": uneven("halting", 3, model__tree__depth=0, model__tree__full_depth=None),
    "halting, dense tree, ZeRO 0": uneven("halting", 0, model__tree__storage="dense"),
    "PonderNet halting, ZeRO 3": uneven("halting", 3, model__halting__kind="ponder"),
    "PonderNet, ragged, ZeRO 1": uneven("ragged", 1, model__halting__kind="ponder"),
    "classes, gru, dense tree, ZeRO 2": case(2, **CLASSES, model__cell="gru", model__tree__storage="dense"),
    "fixed steps, weight decay, no gate gradient, ZeRO 0": case(0, **FIXED, model__tree__gate_gradient="none"),
    "one step, no gate gradient, ZeRO 3": case(3, model__halting__kind="none", model__tree__gate_gradient="none"),
}


@pytest.fixture(scope="module")
def uneven_pairs(request: pytest.FixtureRequest) -> dict[str, tuple[Trace, Trace]]:
    cases = {name: UNEVEN[name] for name in asked_for(request, "name")}
    pairs = zip(traces(2, list(cases.values()), FEW), [train_plainly(case, FEW) for case in cases.values()], strict=True)
    return dict(zip(cases, pairs, strict=True))


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_ranks_agree_and_do_not_hang(uneven_pairs: dict[str, tuple[Trace, Trace]], name: str) -> None:
    trace, reference = uneven_pairs[name]
    assert_same(trace, reference, TOLERANCE)
    if name in {"halting, ZeRO 3", "halting, no tables, ZeRO 3", "PonderNet halting, ZeRO 3"}:
        assert [figures[SUMS.index("ponder_steps")] for figures in trace.figures] == [4 * 1 + 4 * 6] * FEW
    elif "subtree" in name:
        nodes = trace.rows["body.ponder.cell.linear/full/rows"].keys()
        assert nodes == {0, 2}, "the left subtree, and with it rank 0, got a token"
    elif "empty rank" in name:
        assert {figures[SUMS.index("positions")] for figures in trace.figures} == {4.0}


# ---- placement ---------------------------------------------------------------------------------------------------------

PLACEMENTS = {
    "1 rank a copy": case(1, cluster__expert_parallel_size=1),
    "4 ranks a copy": case(0, cluster__expert_parallel_size=4),
    "4 ranks a copy, sharded from level 2": case(2, cluster__shard_level=2),
    "more ranks than leaves": case(1, model__tree__depth=1, model__tree__full_depth=None),
    "uneven halting, 2 ranks a copy, ZeRO 3": uneven("halting", 3, cluster__expert_parallel_size=2, optim__accumulation=2),
    "one rank has all tokens": uneven("subtree", 1),
}


@pytest.fixture(scope="module")
def four_ranks(request: pytest.FixtureRequest) -> dict[str, Trace]:
    names = asked_for(request, "name")
    return dict(zip(names, traces(4, [PLACEMENTS[name] for name in names], FEW), strict=True))


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.thorough
def test_placement_on_four_ranks_equals_plain_torch(four_ranks: dict[str, Trace], name: str) -> None:
    assert_same(four_ranks[name], train_plainly(PLACEMENTS[name], FEW), TOLERANCE)


# ---- steps that are not applied ----------------------------------------------------------------------------------------


def one_row_is_infinite(batch: Batch, step: int) -> Batch:
    """In step 1, on the last rank only."""
    if step == 1:
        batch.inputs[-1, 0, 0] = np.inf
    return batch


# Every two of what gets such a gradient, stage and clipping meet. With hash gates, which do not learn, and a state that
# saturates, the rows alone get one.
NOT_FINITE = {
    "everything, ZeRO 0": case(0, 2),
    "everything, ZeRO 1, without clipping": case(1, clip=0.0),
    "everything, ZeRO 3, without clipping": case(3, 2, clip=0.0),
    "rows alone, ZeRO 0, without clipping": case(0, clip=0.0, model__tree__gate="hash"),
    "rows alone, ZeRO 2": case(2, model__tree__gate="hash"),
    "rows alone, ZeRO 3": case(3, model__tree__gate="hash"),
}
NOT_FINITE = {name: Case(made.config, one_row_is_infinite) for name, made in NOT_FINITE.items()}


@pytest.fixture(scope="module")
def not_finite(request: pytest.FixtureRequest) -> dict[str, Trace]:
    names = asked_for(request, "name")
    return dict(zip(names, traces(2, [NOT_FINITE[name] for name in names]), strict=True))


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.thorough
def test_step_that_is_not_finite_is_skipped_by_all_parts(not_finite: dict[str, Trace], name: str) -> None:
    reference = train_plainly(NOT_FINITE[name], STEPS)
    assert reference.applied == [True, False, True]
    assert_same(not_finite[name], reference, TOLERANCE)


# ---- text, precision, options ------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_ranks_do_not_change_a_transformer_on_text(tmp_path: Path) -> None:
    shared = {"optim__accumulation": 2, "cluster__num_workers": 2}
    kinds = {"act": 3, "fixed": 1}
    cases = [Case(text_config(tmp_path, model__halting__kind=kind, optim__zero_stage=kinds[kind], **shared)) for kind in kinds]
    for case, trace in zip(cases, traces(2, cases, FEW), strict=True):
        assert_same(trace, train_plainly(case, FEW), TOLERANCE)


@pytest.mark.thorough
def test_bf16_is_close_to_fp32_and_keeps_rows_in_fp32() -> None:
    nll, reference = SUMS.index("nll"), plain(CLIP)
    for trace in traces(2, [case(stage, optim__precision="bf16") for stage in (1, 2, 3)], FEW):
        for mine, theirs in zip(trace.figures, reference.figures[:FEW], strict=True):
            assert mine[nll] == pytest.approx(theirs[nll], rel=2**-8)  # bf16 keeps eight bits of every number
        kinds = {part: {row.dtype for row in rows.values()} for part, rows in trace.rows.items()}
        assert all(kinds[part] == {torch.float32} for part in kinds if part.endswith(("rows", "exp_avg", "exp_avg_sq")))
        assert trace.dense["buffers/body.ponder.cell.linear.gate.running_mean"].dtype == torch.float32


def passed_on() -> dict[str, object]:
    """What DeepSpeed made of an option that was passed through."""
    from distcond.train.engine import Engine

    passed = {"zero_optimization": {"overlap_comm": True}, "dump_state": True}
    made = case(2, cluster__num_workers=1, optim__deepspeed=passed)
    config = made.config
    engine = Engine(make_learner(made, LocalFeeder(config, 0, 1).task), config)._engine
    return {"overlap_comm": engine.zero_overlap_comm(), "dump_state": engine.dump_state()}


def test_other_options_reach_deepspeed() -> None:
    assert run_ranks(passed_on, 1) == [{"overlap_comm": True, "dump_state": True}]


def touched_after_training(made: Case) -> list[int]:
    from distcond.train.engine import Engine

    config = on_ranks(made, 1)
    feeder = make_feeder(made, config, 0)
    learner = make_learner(made, feeder.task)
    engine = Engine(learner, config)
    for step in range(2):
        batch = feeder.get(step, 0)
        loss, _ = engine(*(torch.tensor(array) for array in (batch.inputs, batch.targets, batch.lengths)))
        engine.backward(loss)
        engine.step(1e-3)
    return [len(layer.take_touched()) for layer in learner.modules() if isinstance(layer, TreeLinear)]


def test_dense_tree_under_deepspeed_keeps_no_list_of_touched_nodes() -> None:
    assert run_ranks(touched_after_training, 1, case(model__tree__storage="dense")) == [[0]]
