"""Whether runs cut the same inputs into the same regions: the adjusted Rand index of their leaves.

Legend: N positions, M trees.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distcond.deploy.changes import ponder_of
from distcond.errors import RunError
from distcond.nn import TreeLinear
from distcond.opened import OpenedRun, open_run
from distcond.train.state import tensors
from distcond.train.table_files import tree_layers

TOGETHER = 32
"Examples that are run at once: the same for all runs, for it orders the positions of an RNN."
MOST_POSITIONS = 2**15
"Validation positions that are compared; the index is then good to about 0.01."


def stability(runs: list[Path], layer: str = "") -> dict[str, Any]:
    """Adjusted Rand index of each two runs' partitions of the same validation positions, at every level of their trees.

    A region of level l is what reaches the same prefixes of l bits, at the first ponder step. Identical partitions: 1,
    independent ones: about 0. Raises RunError where runs have no trees, or see other inputs.
    """
    opened = [open_run(run) for run in runs]
    for other in opened[1:]:
        if _inputs_of(other) != _inputs_of(opened[0]):
            raise RunError(
                f"{other.folder.path} has another kind of model, or sees other validation inputs, than {runs[0]}; compare runs "
                "of one model on the same data, e.g. with another seed."
            )
    parts = [_leaves(one, layer) for one in opened]
    depth = min(own_depth for _, own_depth in parts)
    pairs = []
    for first, second in combinations(range(len(runs)), 2):
        (left, left_depth), (right, right_depth) = parts[first], parts[second]
        by_level = [
            adjusted_rand(region_of(left >> (left_depth - level)), region_of(right >> (right_depth - level)))
            for level in range(1, depth + 1)
        ]
        pairs.append({"runs": [str(runs[first]), str(runs[second])], "adjusted_rand_per_level": by_level})
    return {"runs": [str(run) for run in runs], "positions": len(parts[0][0]), "depth": depth, "pairs": pairs}


def _inputs_of(opened: OpenedRun) -> tuple[Any, ...]:
    """What decides which validation position is which."""
    task, config = opened.feeder.task, opened.config
    return config.model.name, task.fingerprint(), task.max_length, config.data.validation_examples


def region_of(code_NM: Tensor) -> Tensor:
    """A number for each different row, int64 [N]."""
    region_N: Tensor = torch.unique(code_NM, dim=0, return_inverse=True)[1]
    return region_N


def adjusted_rand(first_N: Tensor, second_N: Tensor) -> float:
    """Agreement of two partitions beyond chance: 1 identical, about 0 independent; labels are int64 and arbitrary.

    Source: Hubert & Arabie 1985, Comparing partitions, equation 5. Two trivial partitions alike agree: 1.
    """
    pairs = torch.stack([first_N, second_N], dim=1)
    together = _num_pairs(torch.unique(pairs, dim=0, return_counts=True)[1])
    left, right = (_num_pairs(torch.unique(part, return_counts=True)[1]) for part in (first_N, second_N))
    expected = left * right / max(1.0, len(first_N) * (len(first_N) - 1) / 2)
    most = (left + right) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def _num_pairs(count_G: Tensor) -> float:
    count_G = count_G.double()
    return float((count_G * (count_G - 1) / 2).sum())


@torch.no_grad()
def _leaves(opened: OpenedRun, name: str) -> tuple[Tensor, int]:
    """Leaves of validation positions at their first step, int64 [N, M], in the order of the data; and the depth."""
    layers = tree_layers(opened.learner.body)
    if not layers or (name and name not in layers):
        has = ", ".join(layers) or "none (model.tree.depth=0)"
        raise RunError(f"{opened.folder.path}: needed is a tree layer{f' {name}' if name else ''}; the model has {has}.")
    layer = layers[name or next(iter(layers))]
    found: list[Tensor] = []
    is_first = True

    def begin(module: Any, given: Any) -> None:
        nonlocal is_first
        is_first = True

    def keep(module: TreeLinear, given: tuple[Tensor, ...]) -> None:
        nonlocal is_first
        if is_first:
            found.append(layer.leaf(given[0]))
            is_first = False

    handles = [ponder_of(opened.learner.body).register_forward_pre_hook(begin), layer.register_forward_pre_hook(keep)]
    examples = opened.config.data.validation_examples
    for start in range(0, examples, TOGETHER):
        rows = opened.feeder.task.validation_rows(start, min(TOGETHER, examples - start))
        opened.learner(*tensors(rows, torch.device("cpu")))
        if sum(map(len, found)) >= MOST_POSITIONS:
            break
    for handle in handles:
        handle.remove()
    return torch.cat(found)[:MOST_POSITIONS], layer.depth
