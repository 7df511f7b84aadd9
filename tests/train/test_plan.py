"""`--dry-run`: what it says is what the run would be."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distcond.cli import main
from distcond.compose import save_config
from distcond.config import Config
from distcond.data.tasks import build_task
from distcond.errors import ConfigError
from distcond.nn import TreeLinear
from distcond.nn.model import Learner
from distcond.table import SubtreePlan
from distcond.train.fits import check_fits, cost_of
from distcond.train.learner import learner_for
from distcond.train.plan import describe
from tests.helpers import changed, small_config, text_config

CONFIGS: list[dict[str, Any]] = [
    {},
    {"model__tree__depth": 0, "model__tree__full_depth": None},
    {"model__tree__storage": "dense", "model__tree__gate": "hash", "model__halting__kind": "fixed"},
    {"model__cell": "lstm", "data__name": "logic", "model__halting__kind": "none"},
    {"cluster__num_workers": 4, "model__tree__depth": 7, "model__tree__full_depth": 3, "optim__zero_stage": 3},
    {"cluster__num_workers": 4, "model__tree__depth": 5, "cluster__expert_parallel_size": 2, "cluster__shard_level": 1},
    {"cluster__num_workers": 2, "model__tree__depth": 4, "cluster__shard_level": 3},
    {"cluster__num_workers": 2, "model__tree__depth": 4, "model__tree__num_trees": 4},
    {"cluster__num_workers": 2, "model__tree__num_trees": 16, "model__tree__gate": "sign", "model__tree__depth": 1},
    {"model__name": "mlp", "model__window": 5},
]


def learner_of(config: Config) -> Learner:
    task = build_task(config.data)
    return learner_for(config, task)


def number(text: str, before: str, after: str) -> int:
    found = re.search(f"{before} *([0-9,]+){after}", text)
    assert found, f"no number between {before!r} and {after!r} in\n{text}"
    return int(found[1].replace(",", ""))


def node_parameters(layer: TreeLinear, plan: SubtreePlan, rank: int) -> int:
    """Numbers in the rows of one rank when every node exists, counted one node at a time."""
    assert layer.table is not None
    nodes = torch.arange(layer.layout.num_ids)
    held = (plan.node_owner(nodes) == -1) | (plan.node_owner(nodes) == rank)
    full = nodes < layer.layout.num_full_ids
    return int((held & full).sum()) * layer.table.full.width + int((held & ~full).sum()) * layer.table.low.width


CASES = [(make, changes) for make in (small_config, text_config) for changes in CONFIGS]
CASES.remove((text_config, CONFIGS[3]))  # a transformer reads bytes
CASES += [(text_config, {"cluster__num_workers": 2, "model__tree__depth": 4, "model__tree__layers": ["up", "qkv"]})]
CASES += [(text_config, {"model__tree__layers": ["merge", "down"], "model__tree__num_trees": 2})]


@pytest.mark.parametrize(("make", "changes"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_dry_run_tells_the_parameters_and_the_placement(tmp_path: Path, make: Any, changes: dict[str, Any]) -> None:
    config = make(tmp_path, **{"cluster__num_workers": 1, **changes})
    text, cost, learner = describe(config), cost_of(config), learner_of(config)
    dense = sum(parameter.numel() for parameter in learner.parameters())
    assert number(text, "dense parameters", "") == cost.dense_parameters == dense
    layers = [layer for layer in learner.modules() if isinstance(layer, TreeLinear) and layer.table is not None]
    size = config.cluster.expert_parallel_size or config.cluster.num_workers
    tree = config.model.tree
    plan = SubtreePlan.make(tree.depth, size, config.cluster.shard_level, tree.num_trees)
    ranks = [sum(node_parameters(layer, plan, rank) for layer in layers) for rank in range(size)]
    everything = sum(node_parameters(layer, SubtreePlan.make(layer.depth, 1, num_trees=layer.num_trees), 0) for layer in layers)
    assert number(text, "node parameters", " if every") == cost.node_parameters == everything
    if layers:
        assert number(text, "up to", " bytes of rows per rank") == 12 * max(ranks)  # a weight and two moments, fp32
        assert ("subtrees over" in text) == plan.is_sharded
    steps = 1 if config.model.halting.kind == "none" else config.model.halting.max_steps
    expected = (cost.macs_per_position + n * cost.macs_per_step for n in (1, steps))
    assert [number(text, "MACs per position", " with 1"), number(text, "step,", f" with {steps}")] == list(expected)


def test_dense_memory_follows_the_zero_stages() -> None:
    """Weights, gradients and moments: 16 bytes a parameter in fp32, of which each stage shares out a further part."""
    ranks, wide = 4, {"model__width": 4096, "cluster__num_workers": 4}
    parameters = cost_of(small_config("unused", **wide)).dense_parameters

    def mib(stage: int) -> str:
        found = re.search(r"memory per rank *([0-9.,]+) MiB", describe(small_config("unused", **wide, optim__zero_stage=stage)))
        assert found
        return found[1]

    # Stage 1 up: an fp32 copy that ZeRO steps on, beside the weights themselves.
    shares = [16, 8 + 12 / ranks, 4 + 16 / ranks, 20 / ranks]
    assert [mib(stage) for stage in range(4)] == [f"{share * parameters / 2**20:,.1f}" for share in shares]


def test_a_cap_bounds_what_is_told_of_a_table(tmp_path: Path) -> None:
    """Full nodes come first, for they are above the others."""
    config = small_config(tmp_path, cluster__num_workers=4, model__tree__depth=40, model__tree__max_nodes=1000)
    text, layer = describe(config), next(m for m in learner_of(config).modules() if isinstance(m, TreeLinear))
    assert layer.table is not None
    numbers = 3 * layer.table.full.width + 997 * layer.table.low.width  # full_depth = 1
    assert number(text, "node parameters", " if every node comes to exist, of at most 1,000") == numbers
    assert number(text, "up to", " bytes of rows per rank") == 12 * numbers


@pytest.mark.parametrize(
    ("changes", "is_sure"),
    [
        ({"model__tree__storage": "dense", "model__tree__depth": 20, "model__tree__full_depth": None, "model__width": 512}, True),
        ({"model__tree__depth": 62, "model__tree__max_nodes": 10**11}, True),
        ({"model__tree__depth": 62, "model__tree__max_nodes": 100}, False),
        ({"model__tree__depth": 62}, False),
        ({"model__tree__depth": 62, "model__tree__max_nodes": 10**11, "cluster__name": "slurm"}, False),
    ],
)
def test_a_table_that_is_sure_not_to_fit_is_refused_with_bytes_needed_and_available(
    tmp_path: Path, changes: dict[str, Any], is_sure: bool
) -> None:
    config = small_config(tmp_path, **changes)
    if not is_sure:
        check_fits(config)
        return
    with pytest.raises(ConfigError, match=r"needs [0-9,]+ bytes .*, [0-9,]+ are available"):
        check_fits(config)


# ---- what a crash can cost ---------------------------------------------------------------------------------------------


def at_risk(config: Config) -> str:
    return describe(config).splitlines()[-1].removeprefix("a crash costs       ")


@pytest.mark.parametrize("make", [small_config, text_config])
def test_what_a_crash_can_cost_is_timed_before_a_run_has_metrics(tmp_path: Path, make: Any) -> None:
    config = make(tmp_path, checkpoint__every=20, train__max_steps=100)
    line = at_risk(config)
    found = re.fullmatch(r"up to 20 steps \(checkpoint.every=20\), about (\S+) s of work at (\S+) s a step \(one rank .*\)", line)
    assert found, line
    assert 20 * float(found[2]) == pytest.approx(float(found[1]), rel=0.05)
    assert 1e-4 < float(found[2]) < 1


def test_what_a_crash_can_cost_is_known_from_the_metrics_of_a_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, checkpoint__every=300, train__max_steps=100)
    (tmp_path / "run").mkdir()
    rows = ["", '{"step": 1, "perf/step_ms": 500.0}', '{"step": 1, "val/nll": 1.0}', '{"step": 2, "perf/step_ms": 700.0}', '{"st']
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(rows))
    expected = "up to 100 steps (checkpoint.every=300), about 60 s of work at 0.6 s a step (by its metrics)"
    assert at_risk(config) == expected


def test_steps_of_a_gpu_or_of_a_large_model_are_not_timed_here(tmp_path: Path) -> None:
    for changes in ({"cluster__gpus_per_worker": 1.0}, {"model__width": 8192}):
        assert at_risk(small_config(tmp_path, **changes)).endswith("; how long one takes, its metrics will say")


# ---- what a run would be refused for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cluster__gpus_per_worker": 1000.0}, "cluster.num_workers=2 x 1000 GPU asks for 2000 GPUs; this machine has"),
        ({"data__name": "text", "data__files": ["none/*.txt"]}, "none/*.txt' matches no file"),
        ({"data__name": "hub", "data__path": "json", "data__files": ["none.json"]}, "none.json' matches no file"),
        ({"data__name": "mixture", "data__sources": {"a": {"name": "text", "files": ["none"], "weight": 1}}}, "none' matches no"),
        ({"model__width": 32}, "holds a run with other settings: model.width=32 (was 16)"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_be_refused_for_and_writes_nothing(
    changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path / "runs")
    (tmp_path / "runs/run").mkdir(parents=True)
    save_config(config, tmp_path / "runs/run/config.yaml")
    (tmp_path / "runs/run/metrics.jsonl").touch()
    save_config(changed(config, **changes), tmp_path / "config.yaml")
    assert main(["train", "--dry-run", "--config", str(tmp_path / "config.yaml")]) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and out == ""
    assert len([*tmp_path.rglob("*")]) == 5


def test_a_dry_run_of_what_other_machines_will_do_asks_this_one_for_no_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(small_config(tmp_path, cluster__name="slurm", cluster__gpus_per_worker=1000.0), tmp_path / "config.yaml")
    assert main(["train", "--dry-run", "--config", str(tmp_path / "config.yaml")]) == 0
    assert "ranks               2" in capsys.readouterr().out
