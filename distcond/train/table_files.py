"""Node tables in files: one for each part of the tables, rows in their order and moments beside them.

A loader on as many ranks takes its own file and is bit-equal; others pick their rows by node id from all files.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distcond.errors import RunError
from distcond.nn import TreeLinear
from distcond.optim.sharded import ShardedRows
from distcond.table import RowStore, SubtreeLoads, SubtreePlan, Visits

FILE_NAME, ANY_FILE = "tables_{:05d}_of_{:05d}.safetensors", "tables_*_of_*.safetensors"
LOG_DECAY = "log_decay"
"Where a file keeps the optimiser's sum of log(1 - lr x weight_decay)."


def tree_layers(model: nn.Module) -> dict[str, TreeLinear]:
    """The tree layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TreeLinear)}


def write_tables(folder: Path, model: nn.Module, tables: ShardedRows) -> None:
    """Write the rows of all ranks into an existing folder. Collective: when it returns, every file is there."""
    for name, rows in own_tables(model, tables).items():
        save_file(rows, folder / name)
    if tables.world.rank == 0:
        for file in folder.glob(ANY_FILE):
            if file.name not in table_names(tables):  # of an earlier save under this name, on another number of ranks
                file.unlink()
    tables.world.sum_(torch.zeros(1))


def table_names(tables: ShardedRows) -> list[str]:
    """The files of all ranks."""
    return [FILE_NAME.format(rank, tables.expert.size) for rank in range(tables.expert.size)]


def own_tables(model: nn.Module, tables: ShardedRows) -> dict[str, dict[str, Tensor]]:
    """The file of this rank and the tensors in it, which may share memory with the tables; none where a replica writes it.

    Collective.
    """
    for layer in tree_layers(model).values():
        if layer.subtree_loads is not None:
            layer.subtree_loads.pool(tables.world)
    if tables.replica.rank:
        return {}
    rows = {key: value for name, layer in tree_layers(model).items() for key, value in _layer_rows(name, layer)}
    rows[LOG_DECAY] = torch.tensor(tables.optimizer.log_decay, dtype=torch.float64)
    return {FILE_NAME.format(tables.expert.rank, tables.expert.size): rows}


def load_tables(
    folder: Path,
    model: nn.Module,
    *,
    rank: int = 0,
    size: int = 1,
    only: Collection[str] | None = None,
    may_lack_low: bool = False,
) -> float:
    """Fill the tables of rank `rank` of `size` expert-parallel ranks, with moments; returns the optimiser's log_decay.

    only: names of the tree layers that are filled; None: all. may_lack_low: whether trees of full levels alone may be those
    from which trees with further, low-rank levels begin.
    Raises RunError where the folder holds no tables, or those of another model.
    """
    layers = {name: layer for name, layer in tree_layers(model).items() if layer.table is not None}
    layers = {name: layer for name, layer in layers.items() if only is None or name in only}
    own, files = folder / FILE_NAME.format(rank, size), sorted(folder.glob(ANY_FILE))
    if not files:
        raise RunError(f"{folder} holds no node tables; give a checkpoint written by an engine of distcond.initialize.")
    parts = [read_tensors(own)] if own in files else []
    same_plan = bool(parts) and all(_is_placed_alike(name, layer, parts[0]) for name, layer in layers.items())
    if not same_plan:
        parts = [read_tensors(file) for file in files]
    for name, layer in layers.items():
        _load_layer(name, layer, parts, folder, may_lack_low)
        _load_plan(name, layer, parts[0] if same_plan else {})
        if not same_plan:
            layer.keep_own(rank)
    return float(parts[0][LOG_DECAY])


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises RunError for any other file."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise RunError(f"{file} is no safetensors file ({error}); choose another step.") from error


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file by name; the tensors are not read. Raises RunError for any other file."""
    try:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise RunError(f"{file} is no safetensors file ({error}); choose another step.") from error


def _is_placed_alike(name: str, layer: TreeLinear, part: dict[str, Tensor]) -> bool:
    """Whether a rank may take its own file as it is."""
    assert layer.table is not None
    is_counted = f"{name}/num_nodes" in part or not layer.table.growth.is_limited
    return is_counted and int(part.get(f"{name}/shard_level", -1)) == layer.plan.shard_level


def _load_plan(name: str, layer: TreeLinear, part: dict[str, Tensor]) -> None:
    """Take over the map from subtrees to ranks, and the loads that the next one will be made from; else begin anew."""
    plan, owner_S, loads_S = layer.plan, part.get(f"{name}/owner"), part.get(f"{name}/loads")
    fresh = SubtreePlan.make(plan.depth, plan.num_ranks, plan.shard_level, plan.num_trees)
    layer.plan = fresh if owner_S is None else replace(plan, owner_S=tuple(owner_S.tolist()))
    if layer.subtree_loads is not None:
        layer.subtree_loads = SubtreeLoads.none(plan)
    if layer.subtree_loads is not None and loads_S is not None:
        layer.subtree_loads.pooled_S.copy_(loads_S)
        layer.subtree_loads.num_steps = int(part[f"{name}/load_steps"])


def _load_layer(name: str, layer: TreeLinear, parts: list[dict[str, Tensor]], folder: Path, may_lack_low: bool) -> None:
    table = layer.table
    assert table is not None
    table.seed = int(layer.seed)
    for kind, store in table.stores():
        prefix = f"{name}/{kind}/"
        pieces = [{k.removeprefix(prefix): v for k, v in part.items() if k.startswith(prefix)} for part in parts]
        if kind == "low" and may_lack_low and not any(pieces):
            continue
        held = pieces[0]["rows"].shape[1] if pieces[0] else "no"
        if held != store.width:
            raise RunError(f"{folder} holds rows of {held} numbers for {name}, the model's have {store.width}.")
        _fill(store, pieces)
    number = parts[0].get(f"{name}/num_nodes")
    table.growth.num_nodes = table.num_nodes if number is None else int(number)
    counted = [part for part in parts if f"{name}/num_nodes" in part]
    visits = [Visits(part[f"{name}/visits/keys"], part[f"{name}/visits/count"]) for part in counted]
    table.growth.visits = Visits.any_of(visits).to(table.full.keys.device)


def _fill(store: RowStore, pieces: list[dict[str, Tensor]]) -> None:
    device = store.keys.device
    whole = {key: torch.cat([piece[key] for piece in pieces]).to(device) for key in pieces[0]}
    keys, rows = whole.pop("keys"), whole.pop("rows")
    if len(pieces) > 1:  # nodes above the shard level are in every file
        ordered, order = torch.sort(keys, stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        chosen = order[first]
        keys, rows, whole = keys[chosen], rows[chosen], {key: value[chosen] for key, value in whole.items()}
    store.replace(keys, rows, whole)


def _layer_rows(name: str, layer: TreeLinear) -> Iterator[tuple[str, Tensor]]:
    if layer.table is None:
        return
    yield f"{name}/shard_level", torch.tensor(layer.plan.shard_level)
    yield f"{name}/owner", torch.tensor(layer.plan.owner_S)
    if layer.subtree_loads is not None:
        yield f"{name}/loads", layer.subtree_loads.pooled_S
        yield f"{name}/load_steps", torch.tensor(layer.subtree_loads.num_steps)
    growth = layer.table.growth
    if growth.is_limited:
        yield f"{name}/num_nodes", torch.tensor(growth.num_nodes)
        yield f"{name}/visits/keys", growth.visits.keys_G.cpu()
        yield f"{name}/visits/count", growth.visits.count_G.cpu()
    for kind, store in layer.table.stores():
        for part, value in {"keys": store.keys, "rows": store.data, **store.state}.items():
            yield f"{name}/{kind}/{part}", value.detach().cpu().contiguous()
