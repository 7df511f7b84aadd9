"""distcond.bench: what is timed is what is said, and the command that says it."""

import json
import time
from pathlib import Path

import pytest
import torch

from distcond import bench, cli
from distcond.bench import timing
from distcond.bench.inference import zipf_tree
from distcond.bench.timing import Machine, Place, time_beside_limits, time_in_turn
from distcond.bench.tree import Case, prepared_layer, work_of


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine allows is measured in a moment, and less exactly: nothing here depends on the figure."""
    monkeypatch.setattr(timing, "GEMM_SIZE", 256)
    monkeypatch.setattr(timing, "COPY_NUMBERS", 2**22)


def test_functions_take_turns_and_the_first_call_does_not_count() -> None:
    calls: list[str] = []

    def first() -> None:
        time.sleep(0.05 if not calls else 0.004)
        calls.append("first")

    times = time_in_turn({"first": first, "second": lambda: calls.append("second")}, repeats=5)
    assert calls == ["first", "second"] * 6
    assert 4 <= times["first"].low <= times["first"].median <= times["first"].high < 50
    assert times["second"].median < times["first"].median


def test_a_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    machine = Machine(flops_per_s=2e9, bytes_per_s=1e9)
    assert machine.floor_ms(4e6, 1e6) == pytest.approx(2.0)
    assert machine.floor_ms(4e6, 3e6) == pytest.approx(3.0)
    times, measured = time_beside_limits({"nothing": lambda: None})
    assert times.keys() == {"nothing"}
    assert 1e9 < measured.flops_per_s < 1e15 and 1e8 < measured.bytes_per_s < 1e13


def test_work_of_a_tree_counts_each_touched_node_once() -> None:
    case = Case(depth=2, tokens=3, width=4, full_depth=1, rank=2)
    layer, x = prepared_layer(case)
    leaves = set(layer.leaf(x).flatten().tolist())
    full, low = 1 + len({leaf >> 1 for leaf in leaves}), len(leaves)
    flops, traffic = work_of(case, layer, x)
    assert traffic == 2 * 4 * (full * (4 * 4 + 4) + low * (2 * (4 + 4) + 4))  # read weights, write gradients; fp32
    assert flops == 2 * 3 * (3 * (4 * 4 + 2 * (4 + 4)) + 2 * 4)
    assert layer.num_materialized == full + low


def test_tokens_have_the_precision_asked_for_and_rows_that_of_masters() -> None:
    place = Place(torch.device("cpu"), torch.bfloat16)
    layer, x = prepared_layer(Case(depth=2, tokens=3, width=4, full_depth=2), place)
    assert (x.dtype, layer(x).dtype, layer.node_weight(0).dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_layers_and_leaves_are_as_asked() -> None:
    torch.manual_seed(0)
    (uniform, x), (zipf, z) = (prepared_layer(Case(8, 512, 16, 4, leaves=leaves)) for leaves in ("uniform", "zipf"))
    busiest = [layer.leaf(tokens).flatten().bincount().max() for layer, tokens in ((uniform, x), (zipf, z))]
    assert busiest[1] > 4 * busiest[0]


def test_tokens_of_inference_reach_leaves_as_often_as_zipf_has_it() -> None:
    layer, x = zipf_tree(depth=3, width=8, tokens=4000)
    counts = layer.leaf(x).flatten().bincount(minlength=8).sort(descending=True).values
    frequency = 1.0 / torch.arange(1, 9) ** 1.1
    expected = 4000 * frequency / frequency.sum()
    assert bool(((counts - expected).abs() < 5 * expected.sqrt()).all())  # five standard errors


@pytest.mark.parametrize("what", cli.BENCHES)
def test_the_command_prints_a_table_and_writes_the_same_rows(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert cli.main(["bench", what, "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 1 and lines[0].split() == " ".join(rows[0]).split()
    assert all(row["ms"] > 0 for row in rows)


def test_every_bench_of_the_command_exists() -> None:
    assert tuple(bench.BENCHES) == cli.BENCHES


def test_a_folder_that_is_missing_is_told_before_anything_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "tree", "--json", str(tmp_path / "none" / "rows.json")]) == 2
    assert "is not a folder" in capsys.readouterr().err
