"""distcond export and distcond.load: the same model in another process, and a folder that says when it was altered."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distcond
from distcond.cli import main
from distcond.config import Config, plugins
from distcond.config.shape import TaskShape
from distcond.deploy.card import AGAIN, write_card
from distcond.deploy.export import ExportOptions, visits, write_model
from distcond.deploy.unfinished import unfinished
from distcond.errors import ConfigError, RunError
from distcond.nn import FlatTree
from distcond.train.run_folder import RunFolder
from tests.deploy.models import TEXT, VECTORS, inputs_for, loads_of, model_config, random_model, starts_of, tree_of
from tests.trees import random_tree, tokens

ROOT = Path(__file__).parents[2]
# fp32: folding sums 4 products in another order; states of size 1, and at most 4 steps of 12 hidden units.
ROUNDING = {"rtol": 0, "atol": 1e-5}
LOW: dict[str, Any] = {"tree__full_depth": 1, "tree__rank": 2}
MODELS: list[tuple[TaskShape, str, str, dict[str, Any]]] = [
    (TEXT, "transformer", "none", {}),
    (TEXT, "transformer", "act", {"tree__storage": "dense", **LOW}),
    (TEXT, "transformer", "ponder", {"tree__num_trees": 3, "tree__gate": "hash"}),
    (TEXT, "transformer", "fixed", {"tree__depth": 40, "tree__min_visits": 2, **LOW}),
    (TEXT, "mlp", "act", {"tree__storage": "host", "tree__gate": "sign"}),
    (TEXT, "rnn", "fixed", {"tree__storage": "dense", "tree__gate_gradient": "magnitude"}),
    (VECTORS, "rnn", "act", {"cell": "lstm", **LOW}),
    (VECTORS, "rnn", "ponder", {"cell": "gru", "tree__storage": "dense", "tree__gate_gradient": "none"}),
    (VECTORS, "rnn", "act", {"tree__depth": 0}),
    (VECTORS, "mlp", "ponder", {"tree__storage": "dense"}),
]


def written(folder: Path, model: Any, config: Any, given: Any = None, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_model(folder, model, config, ExportOptions(**options), loads_of(model, *given) if given else {})
    return folder


@pytest.mark.parametrize(("shape", "name", "halting", "changes"), MODELS)
def test_what_is_loaded_is_the_model_to_the_last_bit(
    tmp_path: Path, shape: TaskShape, name: str, halting: str, changes: dict[str, Any]
) -> None:
    config = model_config(name, halting, **changes)
    model = random_model(config, shape)
    given = inputs_for(shape)
    logits, stats = model(*given)
    before = torch.random.get_rng_state()
    loaded = distcond.load(written(tmp_path, model, config))
    assert torch.equal(torch.random.get_rng_state(), before)
    same, same_stats = loaded(*given)
    assert torch.equal(same, logits) and torch.equal(same_stats.steps, stats.steps)
    assert not loaded.training and not same.requires_grad and loaded.shape == shape
    assert halting in {"none", "fixed"} or len(stats.steps.unique()) > 1
    assert {file.name for file in tmp_path.iterdir()} == {"model.json", "model.safetensors"}


@pytest.mark.parametrize("max_mib", [1.0, 3 * 4 * 12 * 9 / 2**20])
@pytest.mark.parametrize("changes", [{}, {"tree__storage": "dense", **LOW}, {"tree__num_trees": 3}])
def test_a_flattened_model_is_the_model_within_rounding(tmp_path: Path, changes: dict[str, Any], max_mib: float) -> None:
    config = model_config("transformer", "act", **changes)
    num_trees = config.tree.num_trees
    model, given = random_model(config), inputs_for(TEXT)
    loads = loads_of(model, *given)
    logits, stats = model(*given)
    loaded = distcond.load(written(tmp_path, model, config, given, flatten=True, max_mib=max_mib))
    same, same_stats = loaded(*given)
    torch.testing.assert_close(same, logits, **ROUNDING)
    assert torch.equal(same_stats.steps, stats.steps)
    (flat,) = (module for module in loaded.modules() if isinstance(module, FlatTree))
    if max_mib == 1:
        assert len(flat.leaf) == 8 * num_trees and flat.rest is None
    else:
        leaf_G, count_G = loads["ponder.cell.up"]
        assert sorted(count_G[torch.isin(leaf_G, flat.leaf)].tolist()) == sorted(count_G.tolist())[-3 * num_trees :]
        torch.testing.assert_close(loaded(*inputs_for(TEXT, seed=7))[0], model(*inputs_for(TEXT, seed=7))[0], **ROUNDING)
    assert torch.equal(model(*given)[0], logits)  # the run's own model stays as it was


def test_visits_are_of_a_tree_each() -> None:
    layer, x = random_tree(3, num_trees=2), tokens(20).view(4, 5, 5)
    assert torch.equal(visits(layer, x), (layer.leaf(x).flatten(0, 1) + starts_of(layer)).flatten())


def test_bf16_halves_the_file_and_keeps_what_decides(tmp_path: Path) -> None:
    config = model_config("transformer", "act", width=64, feed_forward=128)
    model, given = random_model(config), inputs_for(TEXT)
    whole = (written(tmp_path / "whole", model, config) / "model.safetensors").stat().st_size
    for options in ({}, {"flatten": True}):
        folder = written(tmp_path / "half", model, config, given, bfloat16=True, **options)
        loaded = distcond.load(folder)
        assert loaded(*given)[0].dtype == torch.float32
        # 8 bits of mantissa, logits of size 1; a bit or a step that flips changes more, in few places.
        assert (loaded(*given)[0] - model(*given)[0]).abs().median() < 0.03
        assert torch.equal(loaded.body.ponder.halting.weight, model.body.ponder.halting.weight)
        gate = tree_of(model).gate
        assert gate is not None
        layer = loaded.body.ponder.cell.up
        assert torch.equal(layer.planes if options else layer.gate.weight, gate.weight)
        tensors = load_file(folder / "model.safetensors")
        small = {name for name, value in tensors.items() if value.is_floating_point() and value.dtype == torch.float32}
        assert all(part in name for name in small for part in name.split(".") if part in {"gate", "halting"})
        assert sum(tensors[name].numel() for name in small) < 1000
        if not options:
            assert whole / (folder / "model.safetensors").stat().st_size == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", ["rnn", "mlp"])
def test_vectors_are_read_in_bf16_too(tmp_path: Path, name: str, flatten: bool) -> None:
    config = model_config(name, "act", width=32)
    model, given = random_model(config, VECTORS), inputs_for(VECTORS, 40)
    loaded = distcond.load(written(tmp_path, model, config, given, bfloat16=True, flatten=flatten))
    assert (loaded(*given)[0] - model(*given)[0]).abs().median() < 0.03  # as above


@pytest.mark.parametrize(
    ("changes", "max_mib", "told"),
    [
        ({"tree__depth": 0}, 1.0, "the model has no tree layer"),
        (
            {"tree__gate_gradient": "magnitude"},
            1.0,
            r"--flatten: ponder.cell.up: .* no matrix of its own; export without --flatten\.$",
        ),
        ({}, 1e-4, r"--max-mib 0.0001 holds no leaf of ponder.cell.up, each of which takes 0.000412 MiB; give more"),
    ],
)
def test_what_cannot_be_flattened_is_refused(tmp_path: Path, changes: dict[str, Any], max_mib: float, told: str) -> None:
    config = model_config(**changes)
    model = random_model(config)
    with pytest.raises(RunError, match=told):
        written(tmp_path, model, config, inputs_for(TEXT), flatten=True, max_mib=max_mib)


# ---- the command, on a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(text_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, exported with all of its leaves folded; not to be changed."""
    out = tmp_path_factory.mktemp("exported") / "made" / "model"
    assert main(["export", path_of(text_run), "--out", str(out), "--flatten", "--bf16"]) == 0
    return out


def path_of(config: Config) -> str:
    return str(Path(config.run.dir) / config.run.name)


def test_the_card_says_what_the_model_is_and_what_it_lost(exported: Path, text_run: Config) -> None:
    card = json.loads((exported / "model.json").read_text())
    assert card["task"] == {"kind": "bytes", "input_size": 256, "output_size": 256, "num_classes": 256, "max_length": 16}
    assert card["model"]["halting"]["kind"] == "act" and card["precision"] == "bfloat16" and card["run"]["step"] == 12
    assert card["flattened"] == {"ponder.cell.up": 8} and card["data"] == "text"
    rows = [json.loads(line) for line in (Path(path_of(text_run)) / "metrics.jsonl").read_text().splitlines()]
    figures = card["figures"]
    assert figures["run"]["val/bpb"] == pytest.approx([row for row in rows if "val/bpb" in row][-1]["val/bpb"], rel=1e-6)
    assert 0 < abs(figures["exported"]["val/bpb"] - figures["run"]["val/bpb"]) < 0.02
    assert figures["exported"]["latency_ms"] > 0
    assert [file.name for file in exported.parent.iterdir()] == ["model"]
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1


@pytest.mark.thorough
def test_what_a_killed_export_left_is_removed_by_the_next_one_beside_it(text_run: Config, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distcond", "export", path_of(text_run), "--out", str(tmp_path / "model")]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    while not (left := list(tmp_path.iterdir())) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert left == list(tmp_path.iterdir()) and left[0].name.startswith(".model.")
    with unfinished(tmp_path / "busy") as held:
        assert main(["export", path_of(text_run), "--out", str(tmp_path / "other")]) == 0
        assert sorted(tmp_path.iterdir()) == sorted([held, tmp_path / "other"])


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RunError), unfinished(tmp_path / "deep" / "out") as folder:
        (folder / "part").touch()
        raise RunError("stop")
    assert not list((tmp_path / "deep").iterdir())
    with unfinished(tmp_path / "deep" / "out") as folder:
        (folder / "part").touch()
    assert [file.name for file in (tmp_path / "deep").rglob("*")] == ["out", "part"]


@pytest.mark.thorough
def test_it_loads_where_there_is_nothing_but_torch_and_safetensors(exported: Path) -> None:
    blocked = ["deepspeed", "ray", "hydra", "omegaconf", "wandb", "datasets", "numpy", "psutil", "yaml", "jinja2", "rich"]
    code = f"""
import sys, warnings
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
warnings.simplefilter("ignore")  # torch misses numpy
import distcond, torch
logits, stats = distcond.load({str(exported)!r})(torch.arange(16)[None])
print(logits.double().sum().item(), stats.steps.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=exported, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    logits, stats = distcond.load(exported)(torch.arange(16)[None])
    assert done.stdout == f"{logits.double().sum().item()} {stats.steps.tolist()}\n", done.stderr


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("distcond: error: ") and err.count("\n") == 1
    return err


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _edit(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, **changes}))


def _forge(folder: Path, **changes: Any) -> None:
    """A card with another content and a right seal: of another program, or of a later version."""
    card = json.loads((folder / "model.json").read_text())
    write_card(folder, {**{key: value for key, value in card.items() if key not in {"files", "sha256"}}, **changes})


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (_cut, "model.safetensors was altered"),
        (lambda folder: (folder / "model.json").unlink(), "nor an exported model (it has no model.json)"),
        (lambda folder: (folder / "model.json").write_text("{"), "model.json is damaged (it is no JSON)"),
        (lambda folder: (folder / "model.json").write_text("[]"), "model.json is damaged (it names no format_version)"),
        (lambda folder: _edit(folder, precision="float32"), "model.json was altered"),
        (lambda folder: _forge(folder, format_version=2), "model.json has format 2; this version of distcond reads 1"),
        (lambda folder: _forge(folder, model={"name": "mlp"}), "describes no model that this version knows"),
        (lambda folder: _forge(folder, flattened={"ponder.cell.up": 7}), "model.safetensors does not fit"),
    ],
)
def test_a_missing_or_altered_file_is_named(
    capsys: pytest.CaptureFixture[str], exported: Path, tmp_path: Path, harm: Any, told: str
) -> None:
    shutil.copytree(exported, tmp_path / "model")
    harm(tmp_path / "model")
    assert told in refused(capsys, "predict", str(tmp_path / "model"))
    with pytest.raises(RunError, match=AGAIN):
        distcond.load(tmp_path / "model")


def test_what_is_no_run_or_in_the_way_is_refused_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], exported: Path, text_run: Config, tmp_path: Path
) -> None:
    run, out = path_of(text_run), str(tmp_path / "out")
    assert "model exists; remove it" in refused(capsys, "export", run, "--out", str(exported))
    assert "is not a run folder" in refused(capsys, "export", str(tmp_path), "--out", out)
    assert "has no checkpoint of step 7" in refused(capsys, "export", run, "--out", out, "--step", "7")
    nowhere = tmp_path / "link"
    nowhere.symlink_to(tmp_path / "nowhere")
    assert f"{nowhere} exists; remove it" in refused(capsys, "export", run, "--out", str(nowhere))
    nowhere.unlink()
    assert "--max-mib 4 goes with --flatten" in refused(capsys, "export", run, "--out", out, "--max-mib", "4")
    assert "holds no leaf of" in refused(capsys, "export", run, "--out", out, "--flatten", "--max-mib", "1e-5")
    with RunFolder(Path(run)).locked():
        assert "is still being written" in refused(capsys, "export", run, "--out", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
        (lambda run: [file.write_bytes(b"x") for file in run.rglob("*.safetensors")], "no other checkpoint is intact"),
        (lambda run: _other_format(run), "has format 0; this version reads 1"),
    ],
)
@pytest.mark.parametrize("verb", ["export {run} --out {out}", "predict {run}", "explain {run} --input ab"])
def test_a_run_without_a_checkpoint_that_can_be_read_is_refused(
    capsys: pytest.CaptureFixture[str], text_run: Config, tmp_path: Path, verb: str, harm: Any, told: str
) -> None:
    shutil.copytree(path_of(text_run), tmp_path / "run")
    harm(tmp_path / "run")
    assert told in refused(capsys, *verb.format(run=tmp_path / "run", out=tmp_path / "out").split())


def _other_format(run: Path) -> None:
    from distcond.train.checkpoint import fingerprint

    for state in run.glob("checkpoints/step_*/state.json"):
        state.write_text(json.dumps({**json.loads(state.read_text()), "format_version": 0}))
        manifest = state.with_name("manifest.json")
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "state.json": fingerprint(state)}))


# ---- models of other packages ----------------------------------------------------------------------------------------


def test_a_model_of_another_package_is_loaded_where_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(*names: str) -> None:
        found = tuple(EntryPoint(name, f"{__name__}:made_elsewhere", "distcond.models") for name in names)
        monkeypatch.setattr(plugins, "_installed", lambda section: found)

    installed("elsewhere")
    config = model_config("elsewhere")
    model = random_model(config, VECTORS)
    folder = written(tmp_path, model, config)
    assert torch.equal(distcond.load(folder)(*inputs_for(VECTORS))[0], model(*inputs_for(VECTORS))[0])
    installed()
    with pytest.raises(ConfigError, match=r"model.name=elsewhere: needed is one of .* of which none is installed"):
        distcond.load(folder)


def made_elsewhere(config: Any, shape: TaskShape) -> torch.nn.Module:
    from distcond.nn import pondering, tree_options
    from distcond.nn.mlp import ResidualCell, VectorMLP

    cell = ResidualCell(config.width, tree_options(config.tree))
    return VectorMLP(pondering(cell, config.width, config.halting), shape.input_size, config.width, shape.output_size)
