"""A run that starts from another one's weights: the same function at step 0, whatever becomes a tree and wherever nodes live."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from distcond.compose import save_config
from distcond.config import Config
from distcond.data.batches import LocalFeeder
from distcond.errors import RunError
from distcond.nn import TreeLinear
from distcond.nn.model import Learner
from distcond.opened import open_run
from distcond.train.checkpoint import newest_checkpoint
from distcond.train.grow import check_suits, source_of, start_from
from distcond.train.learner import learner_for
from distcond.train.run_folder import RunFolder
from distcond.train.state import tensors
from tests.helpers import changed, folder_of, metric_rows, small_config, text_config, train_run

DENSE = {"model__tree__depth": 0, "model__tree__full_depth": None, "cluster__num_workers": 1, "train__max_steps": 2}
TREE = {"model__tree__depth": 3, "model__tree__full_depth": 1, "model__tree__rank": 2}
ROUNDING = {"rtol": 0.0, "atol": 2e-6}
"Of logits around 1 in fp32: products over the few rows of a node may add in another order, in a dozen layers after each other."
ALL = ["up", "down", "qkv", "merge"]
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "transformer": (text_config, {}),
    "rnn": (small_config, {}),
    "lstm": (small_config, {"model__cell": "lstm", "model__halting__kind": "ponder"}),
    "mlp": (small_config, {"model__name": "mlp", "model__halting__kind": "fixed"}),
}


def trained(config: Config) -> Config:
    train_run(config)
    save_config(config, folder_of(config).config_file)
    return config


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Finished dense runs, one of each family; not to be changed."""
    made = {name: make(tmp_path_factory.mktemp(name), **DENSE, **options) for name, (make, options) in FAMILIES.items()}
    return {name: trained(config) for name, config in made.items()}


@pytest.fixture(scope="module")
def forest(parents: dict[str, Config]) -> Config:
    """A finished run on two ranks whose `up` has grown out of the dense transformer's; not to be changed."""
    return trained(child(parents["transformer"], run__name="forest", cluster__num_workers=2, train__max_steps=2, **TREE))


def path_of(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def child(parent: Config, **changes: Any) -> Config:
    """What a user asks for who starts from a run."""
    named = {"run__name": "child", "train__init_from": str(path_of(parent)), "train__max_steps": 4}
    return changed(parent, **{**named, **changes})


def fresh(config: Config) -> Learner:
    """The model of a configuration, started from its parent."""
    torch.manual_seed(config.seed + 1)
    learner = learner_for(config, LocalFeeder(config, rank=0, world_size=1).task)
    checkpoint, _ = source_of(RunFolder(Path(config.train.init_from)))
    start_from(learner, checkpoint)
    return learner.eval()


@torch.no_grad()
def answers(learner: Learner, config: Config) -> torch.Tensor:
    feeder = LocalFeeder(config, rank=0, world_size=1)
    logits: torch.Tensor = learner.body(*(tensors(feeder.validation(0), torch.device("cpu"))[index] for index in (0, 2)))[0]
    return logits


def in_parts(layer: torch.nn.Linear, number: int, x: torch.Tensor) -> torch.Tensor:
    """What a dense layer computes, some of its outputs after others."""
    biases = [None] * number if layer.bias is None else layer.bias.chunk(number)
    parts = zip(layer.weight.chunk(number), biases, strict=True)
    return torch.cat([torch.nn.functional.linear(x, weight, bias) for weight, bias in parts], dim=-1)


def trees(learner: Learner) -> dict[str, TreeLinear]:
    return {name.rpartition(".")[2]: layer for name, layer in learner.named_modules() if isinstance(layer, TreeLinear)}


# ---- the same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "storage", "tree"),
    [
        ("transformer", "lazy", {"model__tree__layers": ALL}),
        ("transformer", "dense", {"model__tree__layers": ALL}),
        ("transformer", "host", {"model__tree__layers": ["merge", "up"], "model__tree__num_trees": 4}),
        ("transformer", "lazy", {"model__tree__gate": "hash", "model__tree__gate_gradient": "magnitude"}),
        ("transformer", "dense", {"model__tree__gate": "sign", "model__tree__full_depth": None}),
        ("rnn", "dense", {}),
        ("lstm", "lazy", {"model__tree__num_trees": 2}),
        ("lstm", "host", {}),
        ("mlp", "dense", {}),
        ("mlp", "lazy", {}),
        ("rnn", "lazy", {}),
    ],
)
def test_trees_compute_what_the_linear_layers_they_grow_from_did(
    family: str, tree: dict[str, Any], storage: str, parents: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = parents[family]
    config = child(parent, **{**TREE, **tree, "model__tree__storage": storage})
    learner, old = fresh(config), open_run(path_of(parent)).learner
    assert list(trees(learner)) == [name for name in ("qkv", "merge", "up", "down", "linear") if name in config.model.tree_layers]
    given, expected = answers(learner, config), answers(old, parent)
    torch.testing.assert_close(given, expected, **ROUNDING)
    if family in {"transformer", "mlp"}:  # a dense recurrent cell multiplies its input for all ponder steps at once
        monkeypatch.setattr("distcond.ops.path.TOKENS_PER_MERGED_NODE", 10**9)
        old = open_run(path_of(parent)).learner
        for name, layer in old.named_modules():
            if name.rpartition(".")[2] in trees(
                learner
            ):  # some processors sum the narrower products of a forest in another order
                monkeypatch.setattr(layer, "forward", partial(in_parts, layer, config.model.tree.num_trees))
        assert torch.equal(answers(learner, config), answers(old, parent))  # the same products, and zeros added to them
    assert not torch.equal(answers(learner_for(config, LocalFeeder(config, rank=0, world_size=1).task).eval(), config), given)


@pytest.mark.parametrize("storage", ["lazy", "host"])
@pytest.mark.thorough
def test_a_tree_comes_with_its_nodes_and_gates_while_another_layer_becomes_one(storage: str, forest: Config) -> None:
    config = child(forest, model__tree__layers=["down", "up"], model__tree__storage=storage)
    learner, old = fresh(config), open_run(path_of(forest)).learner
    kept, before = trees(learner)["up"], trees(old)["up"]
    torch.testing.assert_close(answers(learner, config), answers(old, forest), **ROUNDING)
    assert kept.num_materialized == before.num_materialized > 1 == trees(learner)["down"].num_materialized
    for node in range(2**4 - 1):
        assert torch.equal(kept.node_weight(node), before.node_weight(node))
    assert kept.gate is not None and before.gate is not None
    assert torch.equal(kept.gate.weight, before.gate.weight) and torch.equal(kept.gate.running_mean, before.gate.running_mean)
    assert kept.seed == before.seed  # from which nodes that do not exist yet will be made


@pytest.mark.thorough
def test_dense_nodes_are_copied_too(parents: dict[str, Config]) -> None:
    tree = {**TREE, "model__tree__storage": "dense"}
    parent = trained(child(parents["mlp"], run__name="nodes", **tree))
    config = child(parent)
    assert torch.equal(answers(fresh(config), config), answers(open_run(path_of(parent)).learner, parent))  # the same tree


DEEPER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"storage": "lazy", "num_trees": 2}, {"depth": 5}),
    ({"storage": "dense", "num_trees": 2}, {"depth": 5}),
    ({"storage": "lazy", "full_depth": None}, {"depth": 5, "full_depth": 3, "rank": 1}),
    ({"storage": "dense", "full_depth": None}, {"depth": 5, "full_depth": 4, "rank": 1}),
    ({"storage": "dense", "full_depth": None, "gate": "sign"}, {"depth": 4}),
    ({"storage": "lazy", "gate": "hash", "min_visits": 2}, {"depth": 40, "storage": "host"}),
]


@pytest.mark.parametrize(("tree", "deeper"), DEEPER)
def test_a_tree_gets_levels_of_zeros_below_those_it_has(
    tree: dict[str, Any], deeper: dict[str, Any], parents: dict[str, Config]
) -> None:
    options = {f"model__tree__{key}": value for key, value in tree.items()}
    parent = trained(child(parents["mlp"], run__name="-".join(map(str, tree.values())), **{**TREE, **options}))
    config = child(parent, **{f"model__tree__{key}": value for key, value in deeper.items()})
    check_suits(parent, config, source_of(RunFolder(path_of(parent)))[0])
    learner, old = fresh(config), open_run(path_of(parent)).learner
    torch.testing.assert_close(answers(learner, config), answers(old, parent), **ROUNDING)
    layer, before = (trees(model).popitem()[1] for model in (learner, old))
    assert layer.gate is not None and before.gate is not None
    assert any(before.node_weight(node, each).any() for each in range(layer.num_trees) for node in range(7, 15))
    for each in range(layer.num_trees):
        for node in range(15):
            assert torch.equal(layer.node_weight(node, each), before.node_weight(node, each))
            assert torch.equal(layer.node_bias(node, each), before.node_bias(node, each))
        assert not any(layer.node_weight(node, each).any() for node in range(15, 31))
    x = torch.randn(50, layer.in_features, generator=torch.Generator().manual_seed(0))
    gates, expected = layer.gates(x), before.gates(x)
    torch.testing.assert_close(gates[..., :3], expected, **ROUNDING)
    assert len(torch.unique(gates[..., 3:] > 0)) == 2  # and the new bits are bits
    assert layer.storage == "dense" or layer.num_materialized == before.num_materialized


def test_a_run_that_gets_deeper_begins_where_the_old_one_ended_and_fills_its_levels(forest: Config) -> None:
    config = child(forest, run__name="deeper", model__tree__depth=5, cluster__num_workers=1, checkpoint__keep_last=4)
    train_run(config)
    rows = metric_rows(path_of(config))
    last = [row for row in metric_rows(path_of(forest)) if "val/bpb" in row][-1]
    assert rows[0] == pytest.approx({**last, "step": 0}, rel=1e-6)
    save_config(config, folder_of(config).config_file)
    first, end = (trees(open_run(path_of(config), step).learner)["up"] for step in (2, 4))
    assert first.gate is not None and end.gate is not None and end.table is not None
    assert first.gate.running_mean.all()
    assert int(end.table.low.keys.max()) >= 2**5 - 1 and end.effective_weight(0)[0].isfinite().all()
    assert any(end.node_weight(node).any() for node in range(2**5 - 1, 2**6 - 1))


@pytest.mark.thorough
def test_ranks_decide_nothing_where_a_tree_gets_deeper(forest: Config) -> None:
    losses = []
    for workers in (1, 2):
        config = child(forest, run__name=f"deeper{workers}", model__tree__depth=5, cluster__num_workers=workers)
        train_run(config)
        losses.append([row["train/loss"] for row in metric_rows(path_of(config)) if "train/loss" in row])
    # 1e-5: as below
    assert all(math.isclose(one, two, rel_tol=1e-5) for one, two in zip(*losses, strict=True)) and len(losses[0]) == 4


@pytest.mark.parametrize("kind", ["none", "fixed", "ponder"])
def test_under_another_halting_all_but_its_units_is_the_parents(kind: str, parents: dict[str, Config]) -> None:
    config = child(parents["rnn"], model__halting__kind=kind, **TREE)
    old = dict(open_run(path_of(parents["rnn"])).learner.named_parameters())
    new = dict(fresh(config).named_parameters())
    shared = [name for name in new if name in old]
    assert {name for name in new if name not in old} == {"body.ponder.cell.linear.gate.weight"}
    assert {name for name in old if name not in new} >= {f"body.ponder.cell.linear.{part}" for part in ("weight", "bias")}
    assert any("halting" in name for name in shared) == (kind == "ponder")
    assert all(torch.equal(new[name], old[name]) for name in shared)


# ---- runs --------------------------------------------------------------------------------------------------------------


def test_a_grown_run_begins_where_the_old_one_ended_and_resumes_as_if_never_interrupted(parents: dict[str, Config]) -> None:
    parent = parents["transformer"]
    before = {file: file.read_bytes() for file in path_of(parent).rglob("*") if file.is_file()}
    whole = child(parent, run__name="whole", model__tree__layers=ALL, **TREE)
    summary = train_run(whole)
    assert summary["init_from"] == {"run": str(path_of(parent)), "step": 2} and summary["step"] == 4
    rows = metric_rows(path_of(whole))
    last = [row for row in metric_rows(path_of(parent)) if "val/bpb" in row][-1]
    assert rows[0] == pytest.approx({**last, "step": 0}, rel=1e-6)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    train_run(changed(whole, run__name="parts", train__max_steps=2))
    train_run(changed(whole, run__name="parts"))
    assert metric_rows(path_of(changed(whole, run__name="parts"))) == rows
    ends = [newest_checkpoint(RunFolder(path_of(whole).with_name(name)).checkpoints)[0] for name in ("whole", "parts")]
    assert ends[0] is not None and ends[1] is not None
    for file in ends[0].glob("*.safetensors"):
        assert file.read_bytes() == (ends[1] / file.name).read_bytes(), file.name
    assert before == {file: file.read_bytes() for file in path_of(parent).rglob("*") if file.is_file()}


def test_a_run_that_begins_again_before_its_first_checkpoint_writes_its_first_row_once(parents: dict[str, Config]) -> None:
    config = child(parents["mlp"], run__name="again", train__max_steps=1, **TREE)
    folder = folder_of(config)
    folder.metrics.write_text('{"step": 0, "val/sequence_error": 0.5}\n{"step": 1, "train/loss": 9.0}\n')
    train_run(config)
    assert [row["step"] for row in metric_rows(folder.path) if "train/loss" not in row] == [0, 1]


def test_ranks_start_from_an_older_checkpoint_and_leave_a_damaged_one_where_it_is(parents: dict[str, Config]) -> None:
    parent = changed(parents["mlp"], run__name="damaged", train__max_steps=4)
    trained(parent)
    damaged = path_of(parent) / "checkpoints" / "step_00000004" / "dense.safetensors"
    damaged.write_bytes(b"damage")
    summary = train_run(child(parent, run__name="from_older", train__max_steps=1, **TREE))
    assert summary["init_from"]["step"] == 2
    assert damaged.read_bytes() == b"damage"


@pytest.mark.thorough
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["transformer", "forest"])
def test_ranks_and_stages_decide_nothing(name: str, stage: int, parents: dict[str, Config], forest: Config) -> None:
    parent = {**parents, "forest": forest}[name]
    losses = []
    for workers in (1, 2):
        options = {"optim__zero_stage": stage, "cluster__num_workers": workers, "model__tree__layers": ALL}
        config = child(parent, run__name=f"{name}{stage}{workers}", **TREE, **options)
        train_run(config)
        losses.append([row["train/loss"] for row in metric_rows(path_of(config)) if "train/loss" in row])
    assert len(losses[0]) == 4
    # 1e-5: sums over ranks in another order, 4 steps of Adam, no bit flips here (a bit does move a loss by 1e-3)
    assert all(math.isclose(one, two, rel_tol=1e-5) for one, two in zip(*losses, strict=True))


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rnn", {"model__width": 32}, r"holds another model: model.width=32 \(was 16\); use the settings of that run"),
        ("rnn", {"model__cell": "gru"}, r"model.cell=gru \(was tanh\)"),
        ("rnn", {"data__name": "logic"}, "was trained on data=parity, whose examples or vocabulary are not those of data=logic"),
        ("rnn", {"data__num_bits": 9}, "was trained on data=parity, .* use the data of that run"),
        ("transformer", {"model__heads": 1}, r"model.heads=1 \(was 2\)"),
        (
            "forest",
            {"model__tree__depth": 2},
            "has trees of model.tree.depth=3, which can only get deeper, not 2; give .*=3 or more",
        ),
        ("forest", {"model__tree__depth": 4, "model__tree__full_depth": 2}, r"model.tree.full_depth=2 \(was 1\)"),
        ("forest", {"model__tree__depth": 4, "model__tree__rank": 3}, r"model.tree.rank=3 \(was 2\)"),
        ("forest", {"model__tree__depth": 4, "model__tree__num_trees": 2}, r"model.tree.num_trees=2 \(was 1\)"),
        ("forest", {"model__tree__rank": 3}, r"model.tree.rank=3 \(was 2\)"),
        ("forest", {"model__tree__gate": "hash"}, r"model.tree.gate=hash \(was linear\)"),
        ("forest", {"model__tree__storage": "dense"}, r"model.tree.storage=dense \(was lazy or host\)"),
        ("forest", {"model__tree__depth": 0}, "has a tree in up, which nothing else can become; keep it in model.tree.layers"),
        ("forest", {"model__tree__layers": ["down"]}, "has a tree in up, which nothing else"),
    ],
)
def test_what_does_not_suit_is_refused_in_a_line(
    name: str, changes: dict[str, Any], message: str, parents: dict[str, Config], forest: Config
) -> None:
    parent = {**parents, "forest": forest}[name]
    with pytest.raises(RunError, match=f"^train.init_from={path_of(parent)} .*{message}") as refused:
        check_suits(parent, child(parent, **changes), Path())
    assert "\n" not in str(refused.value)


def test_several_trees_of_sign_gates_cannot_get_deeper_for_each_takes_the_inputs_after_another(forest: Config) -> None:
    parent = changed(forest, model__tree__gate="sign", model__tree__num_trees=2)
    with pytest.raises(RunError, match=r"model.tree.depth=4 \(was 3\)"):
        check_suits(parent, child(parent, model__tree__depth=4), Path())
    single = changed(parent, model__tree__num_trees=1)
    check_suits(single, child(single, model__tree__depth=4), Path())


def test_what_needs_no_other_parameters_may_differ(forest: Config, parents: dict[str, Config]) -> None:
    check_suits(forest, child(forest, model__tree__gate_gradient="flip", model__tree__storage="host"), Path())
    check_suits(forest, child(forest, model__tree__max_nodes=5, optim__lr=1.0, seed=3, model__halting__kind="none"), Path())
    check_suits(parents["rnn"], child(parents["rnn"], **TREE, model__tree__num_trees=4), Path())
    check_suits(forest, child(forest, model__tree__depth=40), Path())
    other_text = child(parents["transformer"], data__name="stdlib", data__files=[], data__context=32)
    check_suits(parents["transformer"], other_text, Path())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__width": 8}, r"holds shape \[1, 16\] for body.head.weight, the new model needs shape \[1, 8\]; use the"),
        ({"model__cell": "lstm"}, r"holds shape \[16\] for body.ponder.cell.linear.bias, the new model needs shape \[64\]"),
        ({"model__name": "mlp"}, r"holds shape \[1\] for body.head.bias, the new model needs nothing"),
    ],
)
def test_ranks_name_the_parameter_that_does_not_fit(changes: dict[str, Any], message: str, parents: dict[str, Config]) -> None:
    with pytest.raises(RunError, match=message):
        fresh(child(parents["rnn"], **{**TREE, **changes}))


def test_ranks_refuse_what_would_lose_a_tree(forest: Config) -> None:
    with pytest.raises(RunError, match=r"holds nothing for body.ponder.cell.up.bias, the new model needs shape \[32\]"):
        fresh(child(forest, **{**DENSE, "train__max_steps": 4}))
