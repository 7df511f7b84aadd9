"""Node tables: the row optimiser against its memory traffic, and a step against the size of the table."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from distcond.bench.large import bench_large
from distcond.bench.report import Row
from distcond.bench.rivals import against, fbgemm
from distcond.bench.timing import CPU, Place, places, time_beside_limits, time_in_turn
from distcond.optim.row_adam import RowAdam, add_state
from distcond.table import RowStore

ROWS = [(1_000, 4096), (1_000, 65_536), (10_000, 1024), (100_000, 256)]
"Touched rows, numbers in each."
QUICK_ROWS = [(1_000, 256)]
RIVAL_ROWS = [(1_000, 4096), (10_000, 1024), (100_000, 256)]
SIZES, QUICK_SIZES, TOUCHED, WIDTH = (2**12, 2**16, 2**20), (2**8, 2**12), 512, 513
"Nodes in a table, of which `TOUCHED` are touched a step, `WIDTH` numbers each."
NEW = 8
"Of these nodes, so many are new."
PASSES = 7
"What Adam cannot do without: read weight, gradient and two moments, write three."


def bench_table(quick: bool = False, large: bool = False) -> Iterator[Row]:
    """Milliseconds of an update of touched rows, of a step on tables that differ in size alone, and of a rival.

    large: also a table of 10^9 numbers on two ranks, which takes 12 GB with its moments.
    """
    place = places()[0]
    for touched, width in QUICK_ROWS if quick else ROWS:
        times, machine = time_beside_limits({"update": _update(touched, width, place)}, place)
        floor = machine.floor_ms(0.0, PASSES * 4.0 * touched * width)
        what = "update" if place == CPU else "update on the GPU"
        yield _row(what, 2 * touched, touched, width, times["update"].median, floor, "floor")
    sizes = QUICK_SIZES if quick else SIZES
    times = time_in_turn({str(size): _step(size) for size in sizes})
    for size in sizes:
        yield _row("step", size, TOUCHED, WIDTH, times[str(size)].median, times[str(sizes[0])].median, f"{sizes[0]:,} nodes")
    yield from against({fbgemm.NAME: _against_fbgemm}, quick)
    if large:
        yield from bench_large(quick)


def _against_fbgemm(quick: bool) -> Iterator[Row]:
    """The update alone (theirs: SGD within backward; ours: Adam, which moves two moments more), and with the look-up."""
    for touched, width in QUICK_ROWS if quick else RIVAL_ROWS:
        their_update, their_step = fbgemm.table(touched, width)
        functions = {"update": _update(touched, width), "look up, update": _lookup_and_update(touched, width)}
        times = time_in_turn({**functions, "their update": their_update, "their look up, update": their_step})
        for what in functions:
            yield _row(what, 2 * touched, touched, width, times[what].median, times[f"their {what}"].median, fbgemm.NAME)


def _row(what: str, nodes: int, touched: int, width: int, time: float, other: float, name: str) -> Row:
    sizes = {"nodes": nodes, "touched": touched, "numbers a node": width}
    return {"what": what, **sizes, "ms": time, "against": name, "its ms": other, "ratio": time / other}


def _store(size: int, width: int, place: Place = CPU) -> RowStore:
    store = RowStore(width, place.device)
    for keys in torch.arange(size, device=place.device).split(2**14):
        store.append(keys, torch.zeros(len(keys), width, device=place.device))
    add_state(store)
    for value in store.state.values():
        value.fill_(1)  # takes the memory
    return store


def _update(touched: int, width: int, place: Place = CPU) -> Callable[[], None]:
    store, rows, grad, optimizer = _touched(touched, width, place)
    return lambda: optimizer.step_rows([(store, rows, grad)])


def _lookup_and_update(touched: int, width: int) -> Callable[[], None]:
    """Rows by key, a copy of them, and their update."""
    store, rows, grad, optimizer = _touched(touched, width)
    keys = store.keys[rows]

    def step() -> None:
        found = store.find(keys)
        store.data.index_select(0, found)
        optimizer.step_rows([(store, found, grad)])

    return step


def _touched(touched: int, width: int, place: Place = CPU) -> tuple[RowStore, Tensor, Tensor, RowAdam]:
    """A store, every other row of it by chance, a gradient for these."""
    torch.manual_seed(0)
    rows = torch.randperm(2 * touched)[:touched].sort().values.to(place.device)
    grad_GW = torch.randn(touched, width).to(place.device)
    return _store(2 * touched, width, place), rows, grad_GW, RowAdam(nn.Module())


def _step(size: int) -> Callable[[], None]:
    """Look up, add new nodes, collect a gradient, update."""
    torch.manual_seed(0)
    store, optimizer, grad = _store(size, WIDTH), RowAdam(nn.Module()), torch.randn(TOUCHED, WIDTH)

    def step() -> None:
        keys = torch.randint(store.size, (TOUCHED - NEW,)).unique()
        keys = torch.cat([keys, torch.arange(store.size, store.size + TOUCHED - len(keys))])
        new = keys[store.find(keys) < 0]
        store.append(new, torch.zeros(len(new), WIDTH))
        store.add_gradient(store.find(keys), grad)
        optimizer.step_rows([(store, *store.take_gradient())])

    return step
