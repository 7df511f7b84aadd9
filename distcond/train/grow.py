"""A new run that starts from the weights of another one (`train.init_from`), whose linear layers may become trees.

By name: a linear layer whose place is a tree in the new model becomes that tree's root, its other nodes being zeros, so the new
model computes what the old one did; a tree comes with its nodes and gates, and may get levels below these, of zeros and with new
gates. Optimiser, step and budget are those of a new run.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from distcond.config import TEXTS, Config, DataConfig, GateGradient, GateName, Storage
from distcond.data.tasks import shape_of
from distcond.data.tokens import sha256_of
from distcond.errors import RunError
from distcond.nn import TreeLinear
from distcond.ops import first_node
from distcond.train.checkpoint import DENSE, newest_checkpoint, read_state
from distcond.train.learner import learner_for
from distcond.train.run_folder import RunFolder, flat
from distcond.train.table_files import load_tables, read_shapes, read_tensors, tree_layers

Shapes = Mapping[str, tuple[int, ...]]
"Of tensors by their name in the dense part of a checkpoint."
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
    if _shared_levels(old, new) and new.model.tree.depth < old.model.tree.depth:
        raise RunError(
            f"{name} has trees of model.tree.depth={old.model.tree.depth}, which can only get deeper, not "
            f"{new.model.tree.depth}; give model.tree.depth={old.model.tree.depth} or more, or leave train.init_from out."
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


def deepens(old: Config, new: Config) -> list[str]:
    """Names of the trees that get further levels."""
    return [layer for layer in _trees(old) if _shared_levels(old, new) < new.model.tree.depth and new.model.is_shipped]


def _shared_levels(old: Config, new: Config) -> int:
    """Levels below the root that both runs have in trees; 0: one of them has no tree."""
    return min(old.model.tree.depth, new.model.tree.depth) if _trees(old) and _trees(new) else 0


def _trees(config: Config) -> list[str]:
    return config.model.tree_layers if config.model.tree.depth else []


def _decisive(config: Config, other: Config) -> dict[str, object]:
    """What decides on the parameters of a model, but for the trees that linear layers become, and for halting units."""
    values = {key: getattr(config.model, key) for key in ("name", "options", "width", "heads", "feed_forward", "cell", "window")}
    if not _shared_levels(config, other):
        return values
    tree, depth = config.model.tree, _shared_levels(config, other)
    is_cut = tree.deepest_full_level < depth
    trees = {
        "full_depth": min(tree.deepest_full_level, depth),
        "rank": tree.rank if is_cut else None,
        "num_trees": tree.num_trees,
        "gate": tree.gate.value,
        # Trees take the inputs in turn, K for each, whose signs are their bits.
        "depth": tree.depth if tree.gate == GateName.sign and tree.num_trees > 1 else "at least as deep",
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


def match(model: nn.Module, shapes: Shapes, checkpoint: Path) -> tuple[list[str], list[str]]:
    """Which tree layers of a model grow from linear ones of a checkpoint, and which parameters and buffers are copied.

    shapes: of the tensors in the dense part, by their name in the file. Raises RunError where a tensor has no place, or a
    place no tensor. The new parameters of gates and halting units need none, and halting units may have no place.
    """
    layers = tree_layers(model)
    grown = [name for name in layers if f"buffers/{name}.seed" not in shapes]
    needed = {f"{name}/weight": tuple(value.shape) for name, value in model.named_parameters()}
    needed |= {f"buffers/{name}": tuple(value.shape) for name, value in model.named_buffers()}
    for name in layers.keys() - set(grown):
        needed |= _needed_of_old(name, layers[name], needed, shapes)
    for name in grown:
        own, layer = f"{name}.", layers[name]
        needed = {key: shape for key, shape in needed.items() if not key.removeprefix("buffers/").startswith(own)}
        needed[f"{name}.weight/weight"] = (layer.out_features, layer.in_features)
        if layer.has_bias:
            needed[f"{name}.bias/weight"] = (layer.out_features,)
    held = {key: shape for key, shape in shapes.items() if key.startswith("buffers/") or key.endswith("/weight")}
    # What has no numbers, as the low-rank rows of a tree of full levels, is a buffer, and may be a parameter in another tree.
    needed, held = ({key: shape for key, shape in each.items() if 0 not in shape} for each in (needed, held))
    for key in sorted(needed.keys() | held.keys()):
        if needed.get(key) == held.get(key) or (HALTING in key and not (key in needed and key in held)):
            continue
        has, needs = (f"shape {list(each[key])}" if key in each else "nothing" for each in (held, needed))
        parameter = key.removeprefix("buffers/").removesuffix("/weight")
        raise RunError(f"{checkpoint} holds {has} for {parameter}, the new model needs {needs}; {ADVICE}.")
    roots = {f"{name}.{part}/weight" for name in grown for part in ("weight", "bias")}
    return grown, [key for key in needed if key in held and key not in roots]


def _needed_of_old(name: str, layer: TreeLinear, needed: Shapes, shapes: Shapes) -> Shapes:
    """What a checkpoint needs to hold of a tree with fewer levels, where the new tree's need is another."""
    old_bits = shapes.get(f"buffers/{name}.gate.running_mean", (0,))[0]
    depth, rest = divmod(old_bits, layer.num_trees)
    if rest or not 0 < depth < layer.depth:
        return {}
    full = first_node(min(depth, layer.full_depth) + 1, layer.num_trees)
    low = first_node(depth + 1, layer.num_trees) - full
    firsts = {"gate.weight": old_bits, "gate.running_mean": old_bits, "weight": full, "bias": full, "right": low, "left": low}
    keys = {
        f"{kind}{name}.{part}{end}": first for part, first in firsts.items() for kind, end in (("", "/weight"), ("buffers/", ""))
    }
    return {key: (first, *needed[key][1:]) for key, first in keys.items() if key in needed}


def _copy(key: str, place: Tensor, value: Tensor, layer: TreeLinear | None) -> None:
    """Put a tensor where it belongs; that of a tree with fewer levels before what is new: ids follow level by level."""
    if place.shape == value.shape or layer is None:
        place.copy_(value)
    elif ".gate." in key:  # tree by tree, the bits of each
        bits = len(value) // layer.num_trees
        place.unflatten(0, (layer.num_trees, -1))[:, :bits].copy_(value.unflatten(0, (layer.num_trees, -1)))
    else:
        place[: len(value)].copy_(value)


@torch.no_grad()
def start_from(model: nn.Module, checkpoint: Path) -> None:
    """Give a new model, whole and before ZeRO takes it apart, the weights of a checkpoint. Raises RunError as `match` does."""
    tensors = read_tensors(checkpoint / DENSE)
    grown, copied = match(model, {key: tuple(value.shape) for key, value in tensors.items()}, checkpoint)
    places: dict[str, Tensor] = {f"{name}/weight": parameter for name, parameter in model.named_parameters()}
    places |= {f"buffers/{name}": buffer for name, buffer in model.named_buffers()}
    layers = tree_layers(model)
    for key in copied:
        _copy(key, places[key], tensors[key], _tree_of(key, layers))
    for name in grown:
        layers[name].set_root(tensors[f"{name}.weight/weight"], tensors.get(f"{name}.bias/weight"))
    if kept := layers.keys() - set(grown):
        load_tables(checkpoint, model, only=kept, may_lack_low=True)


def _tree_of(key: str, layers: Mapping[str, TreeLinear]) -> TreeLinear | None:
    return next((layer for name, layer in layers.items() if key.removeprefix("buffers/").startswith(f"{name}.")), None)
