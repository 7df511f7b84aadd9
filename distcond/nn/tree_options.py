"""What a `TreeLinear` may be made of."""

import operator
from numbers import Integral

from distcond.config.check import nearest_divisors
from distcond.nn.gate_gradients import GATE_GRADIENTS

ROWS_IN_DDP = (
    "a TreeLinear that RowAdam trains, as it does every lazy one, would learn other nodes on every rank inside "
    "DistributedDataParallel; use distcond.initialize(model=model, config=...), or storage='dense' and torch's optimizers alone"
)
STORAGES = ("dense", "lazy", "host")


def check_options(
    in_features: int,
    out_features: int,
    depth: int,
    full_depth: int,
    rank: int | None,
    gate_gradient: str,
    storage: str,
    num_trees: int,
) -> None:
    """Raise ValueError with a line that says what was given and what is needed, unless a layer can be made of these."""
    _check_whole(in_features=in_features, out_features=out_features, depth=depth, full_depth=full_depth, num_trees=num_trees)
    _check_whole(rank=1 if rank is None else rank)
    if in_features < 1 or out_features < 1:
        raise ValueError(f"in_features={in_features}, out_features={out_features}: both must be 1 or more")
    if not 0 <= depth <= 62:
        raise ValueError(f"depth={depth} is outside 0..62; node ids are 64-bit integers")
    if num_trees < 1 or out_features % num_trees:
        near = nearest_divisors(out_features, num_trees)
        raise ValueError(f"num_trees={num_trees} does not divide out_features={out_features}; use {near}")
    if depth + (num_trees - 1).bit_length() > 62:
        raise ValueError(f"num_trees={num_trees} trees of depth={depth} have more than 2**62 leaves; use a smaller depth")
    if not 0 <= full_depth <= depth:
        raise ValueError(f"full_depth={full_depth} is outside 0..{depth} (depth)")
    if (full_depth < depth and rank is None) or (rank is not None and rank < 1):
        raise ValueError(f"rank={rank}: levels below full_depth={full_depth} need a rank of 1 or more")
    if gate_gradient not in GATE_GRADIENTS:
        raise ValueError(f"gate_gradient={gate_gradient!r} is unknown; use one of {GATE_GRADIENTS}")
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r} is unknown; use one of {STORAGES}")
    if storage == "dense" and depth > 20:
        raise ValueError(f"depth={depth} with storage='dense' would hold 2**{depth + 1} - 1 nodes; use storage='lazy'")


def check_growth(storage: str, min_visits: int, max_nodes: int | None, num_trees: int) -> None:
    """Raise ValueError with a line that says what was given and what is needed, unless a layer can grow by these."""
    _check_whole(min_visits=min_visits, max_nodes=num_trees if max_nodes is None else max_nodes)
    if min_visits < 1:
        raise ValueError(f"min_visits={min_visits} is below 1; use 1 or more")
    if max_nodes is not None and max_nodes < num_trees:
        raise ValueError(f"max_nodes={max_nodes} is below {num_trees}; the root of a tree always exists")
    if storage == "dense" and (min_visits > 1 or max_nodes is not None):
        raise ValueError(f"min_visits={min_visits}, max_nodes={max_nodes}: dense storage holds every node; use storage='lazy'")


def check_place(name: str, place: int, end: int) -> int:
    """The place as an int, of a tensor of one, too. Raises ValueError unless it is in [0, end)."""
    number = operator.index(place)
    if not 0 <= number < end:
        raise ValueError(f"{name}={number} is outside 0..{end - 1}")
    return number


def _check_whole(**numbers: object) -> None:
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise ValueError(f"{name}={number!r} is no whole number")
