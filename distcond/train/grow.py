"""A new run that starts from the weights of another one (`train.init_from`), whose linear layers may become trees.

By name: a linear layer whose place is a tree in the new model becomes that tree's root, its other nodes being zeros, so the new
model computes what the old one did; a tree comes with its nodes and gates. Optimiser, step and budget are those of a new run.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from distcond.config import TEXTS, Config, DataConfig, GateGradient, Storage
from distcond.data.tasks import shape_of
from distcond.data.tokens import sha256_of
from distcond.errors import RunError
from distcond.train.checkpoint import DENSE, newest_checkpoint, read_state
from distcond.train.learner import learner_for
from distcond.train.run_folder import RunFolder, flat
from distcond.train.table_files import load_tables, read_shapes, read_tensors, tree_layers

HALTING = ".halting."
"In the names of a halting unit's parameters, which alone come and go with the kind of halting."
ADVICE = "use the settings of that run, or leave train.init_from out"
"What to do about a run that cannot be started from."


# ---- where the command was typed ---------------------------------------------------------------------------------------


def source_of(parent: RunFolder) -> tuple[Path, int]:
    """The newest intact checkpoint of a run, and its step.

    Raises RunError where there is no such run, where it is still being written, and where it has no checkpoint or none intact.
    """
    name = f"train.init_from={parent.path}"
    if not parent.config_file.is_file():
        raise RunError(f"{name} holds no run to start from; give a run folder, or the name of a run in run.dir.")
    if parent.is_held():
        raise RunError(f"{name} is still being written; wait for that run to end.")
    checkpoint, _ = newest_checkpoint(parent.checkpoints)
    if checkpoint is None:
        raise RunError(f"{name} has no checkpoint to start from; train that run to its first one.")
    return checkpoint, int(read_state(checkpoint)["step"])


def check_suits(old: Config, new: Config, checkpoint: Path) -> None:
    """Refuse to start `new` from a checkpoint of `old` where data, model or trees do not suit. Raises RunError naming keys."""
    name = f"train.init_from={new.train.init_from}"
    if not _are_alike(old.data, new.data):
        raise RunError(
            f"{name} was trained on data={old.data.name}, whose examples or vocabulary are not those of data={new.data.name}; "
            f"use the data of that run, or leave train.init_from out."
        )
    before, after = flat({"model": _decisive(old, new)}), flat({"model": _decisive(new, old)})
    keys = sorted(before.keys() | after.keys())
    differ = [f"{key}={after.get(key)} (was {before.get(key)})" for key in keys if after.get(key) != before.get(key)]
    if differ:
        raise RunError(f"{name} holds another model: {'; '.join(differ)}; {ADVICE}.")
    lost = [layer for layer in _trees(old) if layer not in _trees(new)]
    if lost:
        raise RunError(f"{name} has a tree in {', '.join(lost)}, which nothing else can become; keep it in model.tree.layers.")
    if not new.model.is_shipped:
        match(learner_for(new, shape_of(new.data)), read_shapes(checkpoint / DENSE), checkpoint)


def changes_function(old: Config, new: Config) -> bool:
    """Whether the new run decides differently on steps, so that its function is another one at step 0."""
    was, is_ = old.model.halting, new.model.halting
    deciding = ("kind", "max_steps", "least_left") if was.kind != "none" or is_.kind != "none" else ()
    return any(getattr(was, key) != getattr(is_, key) for key in deciding)


def becomes(old: Config, new: Config) -> list[str]:
    """Names of the linear layers that become trees; of a model of another package they are its own affair."""
    return [layer for layer in _trees(new) if layer not in _trees(old) and new.model.is_shipped]


def _trees(config: Config) -> list[str]:
    return config.model.tree_layers if config.model.tree.depth else []


def _decisive(config: Config, other: Config) -> dict[str, object]:
    """What decides on the parameters of a model, but for the trees that linear layers become, and for halting units."""
    values = {key: getattr(config.model, key) for key in ("name", "options", "width", "heads", "feed_forward", "cell", "window")}
    if not (_trees(config) and _trees(other)):
        return values
    tree = config.model.tree
    is_cut = tree.deepest_full_level < tree.depth
    trees = {
        "depth": tree.depth,
        "full_depth": tree.deepest_full_level,
        "rank": tree.rank if is_cut else None,
        "num_trees": tree.num_trees,
        "gate": tree.gate.value,
        "gate_gradient": "none" if tree.gate_gradient == GateGradient.none else "one by which gates learn",
        "storage": "dense" if tree.storage == Storage.dense else "lazy or host",
    }
    return values | {"tree": trees}


def _are_alike(old: DataConfig, new: DataConfig) -> bool:
    """Whether a model of one data set can read the other: texts of one vocabulary, or the same task of the same size."""
    if old.name != new.name and not {old.name, new.name} <= {*TEXTS}:
        return False
    was, is_ = shape_of(old), shape_of(new)
    sizes = ("kind", "input_size", "output_size", "num_classes")
    same_tokens = old.tokenizer == new.tokenizer or sha256_of(old.tokenizer) == sha256_of(new.tokenizer)
    return same_tokens and all(getattr(was, size) == getattr(is_, size) for size in sizes)


# ---- in every rank -----------------------------------------------------------------------------------------------------


def match(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], checkpoint: Path) -> tuple[list[str], list[str]]:
    """Which tree layers of a model grow from linear ones of a checkpoint, and which parameters and buffers are copied.

    shapes: of the tensors in the dense part, by their name in the file. Raises RunError where a tensor has no place, or a
    place no tensor. The new parameters of gates and halting units need none, and halting units may have no place.
    """
    layers = tree_layers(model)
    grown = [name for name in layers if f"buffers/{name}.seed" not in shapes]
    needed = {f"{name}/weight": tuple(value.shape) for name, value in model.named_parameters()}
    needed |= {f"buffers/{name}": tuple(value.shape) for name, value in model.named_buffers()}
    for name in grown:
        own, layer = f"{name}.", layers[name]
        needed = {key: shape for key, shape in needed.items() if not key.removeprefix("buffers/").startswith(own)}
        needed[f"{name}.weight/weight"] = (layer.out_features, layer.in_features)
        if layer.has_bias:
            needed[f"{name}.bias/weight"] = (layer.out_features,)
    held = {key: shape for key, shape in shapes.items() if key.startswith("buffers/") or key.endswith("/weight")}
    for key in sorted(needed.keys() | held.keys()):
        if needed.get(key) == held.get(key) or (HALTING in key and not (key in needed and key in held)):
            continue
        has, needs = (f"shape {list(each[key])}" if key in each else "nothing" for each in (held, needed))
        parameter = key.removeprefix("buffers/").removesuffix("/weight")
        raise RunError(f"{checkpoint} holds {has} for {parameter}, the new model needs {needs}; {ADVICE}.")
    roots = {f"{name}.{part}/weight" for name in grown for part in ("weight", "bias")}
    return grown, [key for key in needed if key in held and key not in roots]


@torch.no_grad()
def start_from(model: nn.Module, checkpoint: Path) -> None:
    """Give a new model, whole and before ZeRO takes it apart, the weights of a checkpoint. Raises RunError as `match` does."""
    tensors = read_tensors(checkpoint / DENSE)
    grown, copied = match(model, {key: tuple(value.shape) for key, value in tensors.items()}, checkpoint)
    places: dict[str, Tensor] = {f"{name}/weight": parameter for name, parameter in model.named_parameters()}
    places |= {f"buffers/{name}": buffer for name, buffer in model.named_buffers()}
    for key in copied:
        places[key].copy_(tensors[key])
    layers = tree_layers(model)
    for name in grown:
        layers[name].set_root(tensors[f"{name}.weight/weight"], tensors.get(f"{name}.bias/weight"))
    if kept := layers.keys() - set(grown):
        load_tables(checkpoint, model, only=kept)
