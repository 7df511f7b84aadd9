"""distcond.bench: what is timed is what is said, and the command that says it."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path

import pytest
import torch

from distcond import bench, cli
from distcond.bench import halting, timing
from distcond.bench.exchange import exchange_bytes
from distcond.bench.inference import zipf_tree
from distcond.bench.interconnect import Interconnect, predict
from distcond.bench.large import CHUNK, QUICK_NUMBERS, bench_large
from distcond.bench.report import Row
from distcond.bench.rivals import against
from distcond.bench.rivals.layers import DEEPSPEED_MOE
from distcond.bench.timing import Machine, Place, Timing, time_beside_limits, time_in_turn
from distcond.bench.tree import RIVALS, Case, parts_of, prepared_layer, work_of
from distcond.nn import TreeLinear
from distcond.table import NodeTable, SubtreePlan
from tests.helpers import run_ranks
from tests.thread_ranks import ThreadGroup, run_threads
from tests.trees import seed_cpu


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine allows is measured in a moment, and less exactly: nothing here depends on the figure."""
    monkeypatch.setattr(timing, "GEMM_SIZE", 256)
    monkeypatch.setattr(timing, "COPY_NUMBERS", 2**22)


def test_functions_take_turns_and_the_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock_s = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock_s)

    def called(name: str, first_s: float, later_s: float) -> None:
        nonlocal clock_s
        clock_s += later_s if name in calls else first_s
        calls.append(name)

    functions = {"first": lambda: called("first", 8.0, 0.5), "second": lambda: called("second", 4.0, 0.25)}
    assert time_in_turn(functions, repeats=5) == {"first": Timing(500, 500, 500), "second": Timing(250, 250, 250)}
    assert calls == ["first", "second"] * 6


def test_a_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    machine = Machine(flops_per_s=2e9, bytes_per_s=1e9, read_bytes_per_s=5e8)
    assert machine.floor_ms(4e6, 1e6) == pytest.approx(2.0)
    assert machine.floor_ms(4e6, 3e6) == pytest.approx(3.0)
    assert machine.floor_ms(4e6, 3e6, 1e6) == pytest.approx(5.0)
    times, measured = time_beside_limits({"nothing": lambda: None})
    assert times.keys() == {"nothing"}
    assert 1e9 < measured.flops_per_s < 1e15 and 1e8 < measured.bytes_per_s < 1e13 and 1e8 < measured.read_bytes_per_s < 1e13


def test_work_of_a_tree_counts_each_touched_node_once() -> None:
    case = Case(depth=2, tokens=3, width=4, full_depth=1, rank=2)
    layer, x = prepared_layer(case)
    leaves = set(layer.leaf(x).flatten().tolist())
    full, low = 1 + len({leaf >> 1 for leaf in leaves}), len(leaves)
    parts = parts_of(case, layer, x)
    flops, traffic = work_of(parts)
    full_bytes, low_bytes, vectors = 4 * full * (4 * 4 + 4), 4 * low * (2 * (4 + 4) + 4), 4 * 3 * 4  # fp32
    assert traffic == 2 * (full_bytes + low_bytes)  # read weights, write gradients
    assert flops == 2 * 3 * (3 * (4 * 4 + 2 * (4 + 4)) + 2 * 4)
    assert [part.reads for part in parts] == [full_bytes, 0, low_bytes, 0]
    copies = [0, 2 * full_bytes, 0, 2 * low_bytes]  # backward reads and writes
    assert [part.traffic for part in parts] == [size + count * vectors for size, count in zip(copies, [2, 3, 2, 3], strict=True)]
    assert layer.num_materialized == full + low
    assert layer.table is not None
    assert all(bool(store.data.all()) for _, store in layer.table.stores())  # unwritten zeros are read from a cache


def test_tokens_have_the_precision_asked_for_and_rows_that_of_masters() -> None:
    place = Place(torch.device("cpu"), torch.bfloat16)
    layer, x = prepared_layer(Case(depth=2, tokens=3, width=4, full_depth=2), place)
    assert (x.dtype, layer(x).dtype, layer.node_weight(0).dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_layers_and_leaves_are_as_asked() -> None:
    seed_cpu(0)
    (uniform, x), (zipf, z) = (prepared_layer(Case(8, 512, 16, 4, leaves=leaves)) for leaves in ("uniform", "zipf"))
    busiest = [layer.leaf(tokens).flatten().bincount().max() for layer, tokens in ((uniform, x), (zipf, z))]
    assert busiest[1] > 4 * busiest[0]


def test_tokens_of_inference_reach_leaves_as_often_as_zipf_has_it() -> None:
    layer, x = zipf_tree(depth=3, width=8, tokens=4000)
    counts = layer.leaf(x).flatten().bincount(minlength=8).sort(descending=True).values
    frequency = 1.0 / torch.arange(1, 9) ** 1.1
    expected = 4000 * frequency / frequency.sum()
    assert bool(((counts - expected).abs() < 5 * expected.sqrt()).all())  # five standard errors


@pytest.fixture
def no_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed belongs into other processes than this one, and transformers takes ten seconds to import."""
    monkeypatch.setattr("distcond.bench.tree.RIVALS", {})


@pytest.mark.parametrize("what", ["table", *(pytest.param(what, marks=pytest.mark.thorough) for what in ("tree", "exchange"))])
def test_the_command_prints_a_table_and_writes_the_same_rows(
    what: str, no_rivals: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert cli.main(["bench", what, "--quick", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    rows, lines = written["rows"], capsys.readouterr().out.splitlines()
    tables = [list(names) for names, _ in groupby(rows, key=list)]
    assert len(lines) == len(rows) + 2 * len(tables) - 1  # a head each, and an empty line between two
    assert lines[0].split() == " ".join(tables[0]).split()
    times = [value for row in rows for name, value in row.items() if name.split()[-1] == "ms"]
    assert times and all(time > 0 for time in times)
    assert written["bench"] == what and written["machine"]["torch"] == torch.__version__ and written["machine"]["processor"]


@pytest.mark.thorough
def test_a_training_step_is_timed_beside_a_plain_loop() -> None:
    (rows,) = run_ranks(train_rows, 0)
    assert rows[0]["ms"] > 0 and rows[0]["ratio"] == pytest.approx(rows[0]["ms"] / rows[0]["plain ms"])


def train_rows() -> list[Row]:
    return list(bench.bench_train(quick=True))


def test_every_bench_of_the_command_exists() -> None:
    assert list(bench.BENCHES) == list(cli.BENCHES)


def test_a_rival_that_is_missing_is_named_and_the_others_are_timed() -> None:
    def absent(quick: bool) -> Iterator[Row]:
        import_module("no_such_package")
        yield {}

    def broken(quick: bool) -> Iterator[Row]:
        raise OSError("made for another torch")
        yield {}

    rivals = {"absent": absent, "present": lambda quick: iter([{"rival": "present", "ms": 1.0}]), "broken": broken}
    first, second, third = against(rivals, True)
    assert first["rival"] == "absent" and "no_such_package" in str(first["missing"]) and "[bench]" in str(first["missing"])
    assert second == {"rival": "present", "ms": 1.0}
    assert third["rival"] == "broken" and "another torch" in str(third["missing"])


@pytest.mark.parametrize("gate_gradient", ["none", "sampled"])
@pytest.mark.parametrize("counts", [[[2, 3], [4, 0]], [[0, 0, 0], [7, 0, 1], [0, 5, 2]]])
def test_bytes_counted_are_those_of_the_closed_form(counts: list[list[int]], gate_gradient: str) -> None:
    ranks, depth, inputs, outputs = len(counts), 4, 6, 5
    group = ThreadGroup(ranks)

    def work(rank: int) -> tuple[int, int]:
        seed_cpu(0)
        layer = TreeLinear(inputs, outputs, depth, gate="sign", gate_gradient=gate_gradient, storage="lazy")
        collective = group.collective(rank)
        layer.shard(SubtreePlan.make(depth, ranks), collective)
        x = tokens_owned_by(counts[rank], layer.plan, inputs).requires_grad_()
        y = layer(x)
        forward = collective.sent_bytes
        y.sum().backward()
        return forward, collective.sent_bytes - forward

    def closed_form(rank: int) -> tuple[int, int]:
        sent = sum(counts[rank]) - counts[rank][rank]
        received = sum(row[rank] for row in counts) - counts[rank][rank]
        return exchange_bytes(sent, received, inputs, outputs, depth, ranks)

    assert run_threads(work, [group], ranks) == [closed_form(rank) for rank in range(ranks)]


def tokens_owned_by(counts: list[int], plan: SubtreePlan, width: int) -> torch.Tensor:
    """So many tokens for each rank, whose signs are the path to a leaf of that rank."""
    leaves = torch.cat([torch.full((count,), plan.owner_S.index(rank)) for rank, count in enumerate(counts)])
    leaves = leaves << (plan.depth - plan.shard_level)
    bits = (leaves[:, None] >> torch.arange(plan.depth - 1, -1, -1)) & 1
    return torch.cat([2.0 * bits - 1, torch.zeros(len(bits), width - plan.depth)], dim=1)


def test_an_all_to_all_takes_the_better_of_two_algorithms() -> None:
    link = Interconnect(latency_us=10.0, bandwidth_gb_s=1.0)
    assert link.all_to_all_ms(2, 5, 1e6) == pytest.approx(5 * 0.01 + 1.0)  # one message a call, all bytes once
    large = 1e12  # pairwise: each byte once
    assert link.all_to_all_ms(64, 5, large) == pytest.approx(1e6, rel=1e-3)
    assert link.all_to_all_ms(64, 5, 0.0) == pytest.approx(5 * 6 * 0.01)  # Bruck: log2 of the ranks messages
    assert link.all_reduce_ms(4, 1e6) == pytest.approx(2 * 2 * 0.01 + 1.5)


def test_the_model_charges_replicated_rows_of_both_kinds_once() -> None:
    table = NodeTable(8, 4, depth=20, full_depth=2, rank=3, seed=0, bias=True)
    row = predict(Interconnect(bandwidth_gb_s=1.0), 8, tokens=70, table=table, bytes_per_token=100.0, local_ms=5.0)
    full, low = 7 * (8 * 4 + 4), 24 * (3 * (8 + 4) + 4)  # levels 0 to 4, above 32 subtrees
    assert row["MB of shared rows"] == pytest.approx(4e-6 * (full + low))
    assert row["MB exchanged"] == pytest.approx(1e-6 * 70 * 7 / 8 * 100)


@pytest.mark.slow
def test_every_rival_is_timed_or_named_as_missing(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "distcond", "bench", "tree", "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(file.read_text())["rows"] if "rival" in row]
    assert {row["rival"] for row in rows} == set(RIVALS)
    assert all("missing" in row or row["ms"] > 0 for row in rows)
    assert {row["ranks"] for row in rows if row["rival"] == DEEPSPEED_MOE} == {1, 2}


@pytest.mark.slow
def test_a_large_table_is_as_large_as_asked_and_touched_like_the_small_one() -> None:
    (row,) = bench_large(quick=True)
    assert QUICK_NUMBERS <= row["numbers"] < 1.1 * QUICK_NUMBERS + 2 * CHUNK * 576
    assert row["touched nodes"] == pytest.approx(row["its touched nodes"], rel=0.2)


def test_a_folder_that_is_missing_is_told_before_anything_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "tree", "--json", str(tmp_path / "none" / "rows.json")]) == 2
    assert "is not a folder" in capsys.readouterr().err


# ---- halting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["geometric", "uniform", "one in 128", "all alike"])
@pytest.mark.parametrize("cell", ["tanh", "lstm"])
def test_rows_halt_when_the_bench_wants_them_to_masked_or_not(cell: str, name: str) -> None:
    case = halting.Case(cell, 8, 256, name)
    steps = halting.wanted_steps(case)
    ponder, inputs = halting.counting(case, steps)
    states = tuple(torch.zeros(256, 8) for _ in range(2 if cell == "lstm" else 1))
    state = states if cell == "lstm" else states[0]
    mean, stats = ponder(inputs[:, 0], state)
    masked_mean, masked = halting.MaskedComputation(ponder)(inputs[:, 0], state)
    assert torch.equal(stats.steps, steps) and torch.equal(masked.steps, steps)
    torch.testing.assert_close(masked.remainder, stats.remainder)
    torch.testing.assert_close(masked_mean, mean)


def test_the_bench_of_halting_says_what_steps_promise() -> None:
    training, inference = halting.bench_halting(quick=True)
    assert [row["pass"] for row in (training, inference)] == ["training", "inference"]
    steps = halting.wanted_steps(halting.QUICK[0])
    assert training["saving promised"] == 32 * int(steps.max()) / int(steps.sum()) > 2
    assert training["saving / promised"] == training["saving"] / training["saving promised"]
    assert 4 < halting.wanted_steps(halting.Case("lstm", 8, 10_000, "geometric")).double().mean() < 6
