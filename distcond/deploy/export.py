"""`distcond export RUN --out DIR`: a folder that `distcond.load` reads, measured beside the model of the run."""

import copy
import os
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distcond import __version__
from distcond.bench.timing import time_in_turn
from distcond.config import ModelConfig, Storage
from distcond.config.shape import shape_without
from distcond.data.batches import num_validation_batches
from distcond.data.tasks import bytes_per_token
from distcond.deploy.card import CARD, TOKENIZER, WEIGHTS, read_card, write_card
from distcond.deploy.load import BFLOAT16, Deployed, load, to_bfloat16
from distcond.deploy.served import check_answer
from distcond.deploy.unfinished import unfinished
from distcond.errors import RunError
from distcond.nn import TreeLinear, flatten
from distcond.nn.model import SUMS, with_loss
from distcond.opened import OpenedRun, open_run
from distcond.train.metrics import ponder, quality
from distcond.train.run_folder import check_writable
from distcond.train.state import tensors
from distcond.train.table_files import tree_layers

LATENCY_REPEATS = 20
"Single examples timed, of each model in turn."
ROWS = (".table.full.rows", ".table.low.rows")
VISITS = (".table.visits.keys", ".table.visits.count")
"What a table of limited growth has counted, which only training needs."

Loads = dict[str, tuple[Tensor, Tensor]]
"Of each tree layer: leaves that were visited, tree << depth | leaf, int64 [G], and by how many tokens."


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What `distcond export` may do to a model."""

    flatten: bool = False
    "Fold the trees: a leaf becomes one matrix."
    max_mib: float = 1024.0
    "MiB that the folded leaves of the model may take; where not all fit, those that most validation tokens visit."
    bfloat16: bool = False
    "Weights in bf16, but for those of gates and halting units."


def export(run: Path, out: Path, step: int | None = None, options: ExportOptions | None = None) -> dict[str, Any]:
    """Write the model of a checkpoint into a folder that does not exist yet; returns its card.

    The figures of the card are those of the run's model and of what `load` makes of the folder, on the validation set.
    Raises RunError as `open_run` does, where the folder exists, and where the trees cannot be flattened.
    """
    options = options or ExportOptions()
    if os.path.lexists(out):  # a link that leads nowhere, too
        raise RunError(f"{out} exists; remove it, or give another --out.")
    check_writable(out, "choose another --out.")
    opened = open_run(run, step)
    config = opened.config
    trained = Deployed(opened.learner.body, shape_without(opened.feeder.task), {})
    before, loads = _measure(trained, opened)
    check_answer(torch.tensor(list(before.values())))
    about = {"run": {"name": run.absolute().name, "step": opened.step}, "data": str(config.data.name)}
    with unfinished(out) as folder:
        entries = write_model(folder, trained, config.model, options, loads, config.data.tokenizer)
        exported = load(folder)
        after, _ = _measure(exported, opened)
        run_ms, exported_ms = _latency_ms(trained, exported, opened)
        figures = {"run": {**before, "latency_ms": run_ms}, "exported": {**after, "latency_ms": exported_ms}}
        write_card(folder, {**about, **entries, "figures": figures})
    return read_card(out)


def write_model(
    folder: Path, trained: Deployed, config: ModelConfig, options: ExportOptions, loads: Loads, tokenizer: str = ""
) -> dict[str, Any]:
    """Write what `load` needs into an existing folder; returns the entries of the card. Raises RunError as `export` does.

    loads: where flattened trees do not fit as a whole, what their tokens visited.
    """
    body, config, flattened = _prepared(trained.body, config, loads, options)
    entries = {
        "distcond": __version__,
        "task": asdict(trained.shape),
        "model": asdict(config),
        "flattened": flattened,
        "precision": BFLOAT16 if options.bfloat16 else "float32",
    }
    _write_weights(folder / WEIGHTS, body, options)
    if tokenizer:
        shutil.copyfile(Path(tokenizer).expanduser(), folder / TOKENIZER)
    write_card(folder, entries)
    shutil.copymode(folder / CARD, folder / WEIGHTS)  # NOTE: safetensors writes for the owner alone
    return entries


@torch.no_grad()
def _measure(model: Deployed, opened: OpenedRun) -> tuple[dict[str, float], Loads]:
    """Quality and steps on the validation set, and where its tokens went in the model's tree layers."""
    visited: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, given, name=name: visited.setdefault(name, []).append(visits(layer, given[0]))
        )
        for name, layer in tree_layers(model.body).items()
    ]
    learner = with_loss(model, opened.config.model, is_text=opened.learner.is_text, num_classes=opened.learner.num_classes)
    learner.eval()
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    for index in range(num_validation_batches(opened.config, 1)):
        total += learner(*tensors(opened.feeder.validation(index), torch.device("cpu")))[1]
    for handle in handles:
        handle.remove()
    per_token = bytes_per_token(opened.feeder.task, "validation")
    figures = quality(total, is_text=learner.is_text, prefix="val", bytes_per_token=per_token) | ponder(total, "val/ponder")
    return figures, {name: torch.unique(torch.cat(parts), return_counts=True) for name, parts in visited.items()}


def visits(layer: TreeLinear, x: Tensor) -> Tensor:
    """Leaf of each token in each tree, tree << depth | leaf, int64 [tokens x trees]."""
    leaf_TM = layer.leaf(x).view(-1, layer.num_trees)
    return (leaf_TM + (torch.arange(layer.num_trees, device=leaf_TM.device) << layer.depth)).flatten()


def _prepared(
    body: nn.Module, config: ModelConfig, loads: Loads, options: ExportOptions
) -> tuple[nn.Module, ModelConfig, dict[str, int]]:
    """What is exported: the body, the configuration that it is built from again, and the leaves folded of each layer."""
    if not (options.flatten or options.bfloat16):
        return body, config, {}
    body = copy.deepcopy(body)
    flattened = _flatten(body, loads, options) if options.flatten else {}
    if options.bfloat16:
        to_bfloat16(body)
    if flattened and not tree_layers(body):
        # Nothing of the trees is left but their gates: what is built to be replaced need not hold every node.
        config = replace(config, tree=replace(config.tree, storage=Storage.lazy))
    return body, config, flattened


def _flatten(body: nn.Module, loads: Loads, options: ExportOptions) -> dict[str, int]:
    """Replace the tree layers of a body by flattened ones, which share the budget equally. Raises RunError."""
    layers = tree_layers(body)
    if not layers:
        raise RunError("--flatten: the model has no tree layer (model.tree.depth=0); export it without.")
    share = options.max_mib * 2**20 / len(layers)
    folded = {}
    for name, layer in layers.items():
        leaf_bytes = _leaf_bytes(layer, options)
        if leaf_bytes > share:
            raise RunError(
                f"--max-mib {options.max_mib:g} holds no leaf of {name}, each of which takes {leaf_bytes / 2**20:.3g} MiB; "
                "give more, or export without --flatten."
            )
        try:
            flat = flatten(layer, int(share // leaf_bytes), loads[name])
        except ValueError as error:
            raise RunError(f"--flatten: {name}: {error}; export without --flatten.") from error
        body.set_submodule(name, flat)
        folded[name] = len(flat.leaf)
    return folded


def _leaf_bytes(layer: TreeLinear, options: ExportOptions) -> int:
    return (2 if options.bfloat16 else 4) * layer.out_features // layer.num_trees * (layer.in_features + 1)


def _write_weights(file: Path, body: nn.Module, options: ExportOptions) -> None:
    state = {name: value.detach() for name, value in body.state_dict().items()}
    for name, value in state.items():
        if name.endswith(VISITS):
            state[name] = value[:0]
        elif name.endswith(ROWS) and options.bfloat16:  # in memory they stay fp32
            state[name] = value.bfloat16()
    # Clones, because tensors in a file must not share memory, as tied weights do.
    save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}, file)


@torch.no_grad()
def _latency_ms(trained: Deployed, exported: Deployed, opened: OpenedRun) -> tuple[float, float]:
    """Median milliseconds of one validation example on its own, of both in turn."""
    inputs, _, lengths = (part[:1] for part in tensors(opened.feeder.validation(0), torch.device("cpu")))
    models = {"run": trained, "exported": exported}
    times = time_in_turn({name: partial(model, inputs, lengths) for name, model in models.items()}, LATENCY_REPEATS)
    return times["run"].median, times["exported"].median
