"""`distcond.initialize` in somebody else's DeepSpeed loop: same results on any ranks, checkpoints that carry the tables."""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distcond
from distcond.errors import ConfigError, RunError
from distcond.optim import RowAdam
from tests.helpers import run_ranks
from tests.train.foreign import ADAM, BATCH, CLIP, Theirs, batch, start, train
from tests.train.traces import MarginWatch, Trace, assert_same, buffers, join, rows_by_node
from tests.trees import seed_cpu

STEPS = 3
TOLERANCE = 1e-6  # fp32: other orders of summation


def full_weights(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def trace_of(engine: Any, losses: list[float], margin: float) -> Trace:
    dense = full_weights(engine) | buffers(engine.module)
    return Trace([[loss] for loss in losses], [engine.joint_grad_norm], [True], dense, rows_by_node(engine.module), margin)


def foreign_loops(cases: list[tuple[int, int, float]]) -> list[Trace]:
    """What a few steps leave behind, for each (ZeRO stage, accumulation, clipping)."""
    found = []
    for case in cases:
        engine = start(*case, seed=dist.get_rank())  # what starts differently becomes rank 0's
        watch = MarginWatch(engine.module)
        losses = train(engine, 0, STEPS)
        found.append(trace_of(engine, losses, watch.margin))
    return found


@cache
def plain_loop(clip: float) -> Trace:
    """The same with torch alone."""
    seed_cpu(0)
    model = Theirs()
    watch, rows = MarginWatch(model), RowAdam(model, betas=(0.9, 0.95), eps=ADAM["eps"], weight_decay=ADAM["weight_decay"])
    adam = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norm = [], 0.0
    for step in range(STEPS):
        rate = 1e-3 + (1e-2 - 1e-3) * max(0, step - 1) / 4  # DeepSpeed's WarmupLR; its first two rates are the least
        adam.param_groups[0]["lr"] = rows.lr = rate
        adam.zero_grad()
        loss = model(*batch(step))
        loss.backward()
        gradients = [(store, *store.take_gradient()) for store in rows.stores()]
        dense = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = sum(float(grad.double().square().sum()) for grad in (*dense, *(grad for _, _, grad in gradients))) ** 0.5
        scale = min(1.0, clip / norm) if clip else 1.0
        for grad in dense:
            grad.mul_(scale)
        adam.step()
        rows.step_rows([(store, touched, grad * scale) for store, touched, grad in gradients])
        for layer in rows.layers:
            layer.commit_statistics()
        losses.append(float(loss.detach()))
    dense_part = {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers(model)
    return Trace([[loss] for loss in losses], [norm], [True], dense_part, rows_by_node(model), watch.margin)


CASES = {  # tests/train/test_engine.py crosses each two of stage, accumulation and clipping
    1: [(0, 1, CLIP), (3, 2, 0.0)],
    2: [(0, 2, 0.0), (1, 1, CLIP), (2, 2, CLIP), (3, 1, 0.0)],
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_foreign_loop_does_not_depend_on_ranks(world_size: int) -> None:
    cases = CASES[world_size]
    for case, ranks in zip(cases, zip(*run_ranks(foreign_loops, world_size, cases), strict=True), strict=True):
        assert_same(join(list(ranks)), plain_loop(case[2]), TOLERANCE)


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def save_and_load(folder: str, stages: list[int]) -> list[list[Any]]:
    """For each ZeRO stage, (losses, rows, gates' statistics) after going on, and after going on from a checkpoint."""
    found = []
    for stage in stages:
        place = f"{folder}/zero_{stage}"
        engine = start(stage)
        train(engine, 0, 2)
        engine.save_checkpoint(place, client_state={"note": "ours"})
        saved = rows_by_node(engine.module)
        straight = (train(engine, 2, 4), rows_by_node(engine.module), buffers(engine.module))
        other = start(stage, seed=1)
        _, client_state = other.load_checkpoint(place)
        assert client_state["note"] == "ours"
        loaded = rows_by_node(other.module)
        assert all(torch.equal(row, loaded[part][node]) for part, rows in saved.items() for node, row in rows.items())
        found.append([straight, (train(other, 2, 4), rows_by_node(other.module), buffers(other.module))])
    return found


def go_on(folder: str, stage: int) -> list[float]:
    engine = start(stage, seed=2)
    engine.load_checkpoint(folder)
    return train(engine, 2, 4)


@pytest.mark.thorough
def test_checkpoint_of_a_foreign_loop_carries_the_tables(tmp_path: Path) -> None:
    ranks = run_ranks(save_and_load, 2, str(tmp_path), [0, 2, 3])
    for straight, resumed in (pair for rank in ranks for pair in rank):
        assert straight[0] == resumed[0]
        for before, after in zip(straight[1:], resumed[1:], strict=True):
            assert before.keys() == after.keys()
            torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (tmp_path / "zero_2" / "latest").read_text() == "global_step2"
    # Another number of ranks: DeepSpeed itself allows that at ZeRO 0 alone.
    (fewer,) = run_ranks(go_on, 1, str(tmp_path / "zero_0"), 0)
    assert fewer == pytest.approx(ranks[0][0][0][0], rel=1e-5)


# ---- what is refused, and what is not needed ---------------------------------------------------------------------------


def refusals(folder: str) -> list[str]:
    engine = start(0)
    train(engine, 0, 1)
    engine.save_checkpoint(folder, tag="mine")
    if dist.get_rank() == 0:
        for file in Path(folder).glob("mine/tables_*"):
            file.unlink()  # as in a checkpoint that DeepSpeed alone has written
    dist.barrier()
    lines = []
    for attempt, error in (
        (lambda: start(1, expert_parallel_size=3), ConfigError),
        (lambda: distcond.initialize(model=Theirs(), config={"fp16": {"enabled": True}}), ConfigError),
        (lambda: engine.load_checkpoint(folder), RunError),
    ):
        with pytest.raises(error) as refused:
            attempt()
        lines.append(str(refused.value))
    return lines


def test_impossible_requests_are_refused_in_one_line(tmp_path: Path) -> None:
    for lines in run_ranks(refusals, 2, str(tmp_path)):
        assert lines[0] == "expert_parallel_size=3 does not divide the 2 ranks."
        assert "fp16" in lines[1] and "bf16" in lines[1]
        assert "holds no node tables" in lines[2]
        assert not any("\n" in line for line in lines)


def loop_alone(folder: str) -> list[float]:
    """A script that nobody launched: no process group, no ranks; its own optimiser and a config file."""
    seed_cpu(0)
    model, file = Theirs(), Path(folder) / "ds_config.json"
    file.write_text(json.dumps({"train_batch_size": BATCH, "zero_allow_untested_optimizer": True}))
    adam = torch.optim.AdamW(model.parameters(), **ADAM)
    engine, *_ = distcond.initialize(model=model, config=str(file), optimizer=adam)
    assert (engine.tables.optimizer.eps, engine.tables.optimizer.weight_decay) == (ADAM["eps"], ADAM["weight_decay"])
    return train(engine, 0, 3)


def loaded_compilers() -> list[bool]:
    engine = start(1)
    train(engine, 0, 1)
    return ["torch._inductor.compile_fx" in sys.modules, "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules]


def test_training_loads_no_compiler() -> None:
    """3 s of imports, for functions of Muon that ZeRO asks for whatever the optimiser is."""
    assert run_ranks(loaded_compilers, 1) == [[False, True]]


def test_what_is_compiled_late_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime import compiler

    from distcond.train.deepspeed_start import compiling_late

    asked: list[dict[str, Any]] = []

    def compile_at_once(**options: Any) -> Any:
        asked.append(options)
        return lambda function: lambda number: function(number) + 100

    monkeypatch.setattr(compiler, "compile", compile_at_once)
    with compiling_late():
        function = compiler.compile(dynamic=True)(abs)
    assert not asked and compiler.compile is compile_at_once
    assert [function(-1), function(-2)] == [101, 102]
    assert asked == [{"dynamic": True}]


def test_a_process_on_its_own_needs_no_launcher(tmp_path: Path) -> None:
    (losses,) = run_ranks(loop_alone, 0, str(tmp_path))
    assert losses[2] < losses[0]
