"""The rows of a lazy table travel with their layer: between devices, and through state dicts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from distcond.table import NodeTable, RowStore, Visits

COUNTED = ("visits.keys", "visits.count", "num_nodes")
"Entries of a table whose growth is limited."


def move_rows(table: NodeTable, fn: Callable[[Tensor], Tensor]) -> None:
    """Move the rows as `fn` moves a tensor, to another device (unless they stay) and to fp64; never below fp32."""
    for _, store in _stores(table):
        probe = fn(store.data[:0])
        store.move(store.data.device if table.rows_stay else probe.device, torch.promote_types(probe.dtype, torch.float32))
    table.growth.to(table.full.keys.device)


def row_names(table: NodeTable | None, prefix: str) -> set[str]:
    """Names of the entries that hold rows in a state dict, and what is counted for a table whose growth is limited."""
    names = {f"{prefix}table.{kind}.{part}" for kind, _ in _stores(table) for part in ("keys", "rows")}
    return names | ({f"{prefix}table.{part}" for part in COUNTED} if table is not None and table.growth.is_limited else set())


def save_rows(table: NodeTable | None, destination: dict[str, Any], prefix: str) -> None:
    """Put the rows into a state dict."""
    for kind, store in _stores(table):
        destination[f"{prefix}table.{kind}.keys"] = store.keys
        destination[f"{prefix}table.{kind}.rows"] = store.data
    if table is not None and table.growth.is_limited:
        growth = table.growth
        counted = (*growth.visits, growth.visits.keys_G.new_tensor(growth.num_nodes))
        destination |= {f"{prefix}table.{part}": value for part, value in zip(COUNTED, counted, strict=True)}


def load_rows(table: NodeTable | None, state_dict: Mapping[str, Any], prefix: str, errors: list[str]) -> None:
    """Take over the rows of a state dict where it holds them; what does not fit is added to `errors`."""
    for kind, store in _stores(table):
        keys, rows = (state_dict.get(f"{prefix}table.{kind}.{part}") for part in ("keys", "rows"))
        if table is not None and keys is not None and rows is not None:
            first = 0 if kind == "full" else table.num_full_ids
            end = table.num_full_ids if kind == "full" else table.num_ids
            _load(store, keys, rows, range(first, end), f"{prefix}table.{kind}.rows", errors)
            _load_counted(table, *(state_dict.get(f"{prefix}table.{part}") for part in COUNTED))


def _load_counted(table: NodeTable, keys: Tensor | None, count: Tensor | None, number: Tensor | None) -> None:
    """Take over what was counted; where nothing was, the rows are the whole of the table."""
    table.growth.num_nodes = table.num_nodes if number is None else int(number)
    table.growth.visits = Visits.none() if keys is None or count is None else Visits(keys.clone(), count.clone())
    table.growth.to(table.full.keys.device)


def _stores(table: NodeTable | None) -> Iterator[tuple[str, RowStore]]:
    if table is not None:
        yield from table.stores()


def _load(store: RowStore, keys: Tensor, rows: Tensor, ids: range, name: str, errors: list[str]) -> None:
    """Take over rows; those of nodes that exist keep their optimiser state."""
    if rows.shape != (len(keys), store.width):
        errors.append(f"size mismatch for {name}: {tuple(rows.shape)}, needed are ({len(keys)}, {store.width})")
        return
    if len(keys) and not (int(keys.min()) >= ids.start and int(keys.max()) < ids.stop):
        errors.append(f"node ids for {name}: {int(keys.min())} to {int(keys.max())}, needed are {ids.start} to {ids.stop - 1}")
        return
    keys = keys.to(store.keys.device)
    store.replace(keys, rows.to(store.data), store.state_of(keys))
