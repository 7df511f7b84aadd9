"""A look at a model while it answers some validation examples: steps, loss and entropy of each element, leaves of its trees.

Legend: B examples, T positions, M trees, K depth, V leaves asked for.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distcond.data.batch import Batch, select
from distcond.data.tasks import Task, TextTask
from distcond.nn import TreeLinear
from distcond.nn.model import Learner
from distcond.positions import Positions, ask
from distcond.train.table_files import tree_layers

MOST_POSITIONS = 8192
"Positions looked at: of the default model about half a second."
AT_ONCE = 2048
"Positions in a pass."
KEPT_INPUTS = 512
"Inputs of a layer that are kept, to see what each level adds to its output."


@dataclass(slots=True)
class LayerUse:
    """What reached a tree layer, over all ponder steps."""

    leaf_V: Tensor
    "Leaves, tree << depth | leaf, ascending int64."
    count_V: Tensor
    "Tokens that each was asked for by."
    inputs_TQ: Tensor
    "Some of the inputs."
    first_leaf_BTM: Tensor | None
    "Leaf of each position and tree at its first step, int64; None where the model does not read all positions at once."


@dataclass(slots=True)
class Probe:
    """What was seen."""

    batch: Batch
    positions: Positions
    layers: dict[str, LayerUse]


@dataclass(slots=True)
class _Seen:
    """What hooks of a layer collect."""

    leaves: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    is_first: bool = True


@torch.no_grad()
def probe(learner: Learner, task: Task, num_examples: int) -> Probe:
    """Look at up to MOST_POSITIONS of the validation set, of its `num_examples`."""
    count = max(1, min(num_examples, MOST_POSITIONS // task.max_length))
    examples = _examples(task, num_examples, count)
    rows = max(1, AT_ONCE // task.max_length)
    seen, parts = defaultdict[str, _Seen](_Seen), []
    with _watched(learner, seen):
        for start in range(0, count, rows):
            batch = select(examples, slice(start, start + rows))
            for layer in seen.values():
                layer.is_first = True
            parts.append(ask(learner, batch)[1])
    positions = Positions.join(parts)
    shape = positions.valid.shape
    uses = {name: _use(seen[name], layer, shape) for name, layer in tree_layers(learner).items() if seen[name].leaves}
    return Probe(examples, positions, uses)


def loss_of(learner: Learner, batch: Batch) -> float:
    """Mean bits of an element."""
    _, positions = ask(learner, batch)
    return float(positions.loss_bits[positions.valid].mean())


@contextmanager
def _watched(learner: Learner, seen: dict[str, _Seen]) -> Iterator[None]:
    handles = []
    for name, layer in tree_layers(learner).items():

        def note(module: TreeLinear, given: tuple[Tensor, ...], name: str = name) -> None:
            _note(seen[name], module, given[0].reshape(-1, module.in_features))

        handles.append(layer.register_forward_pre_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(seen: _Seen, layer: TreeLinear, x_TQ: Tensor) -> None:
    leaf_TM = layer.leaf(x_TQ)
    keys_TM = leaf_TM + (torch.arange(layer.num_trees) << layer.depth)
    leaves, counts = torch.unique(keys_TM, return_counts=True)
    seen.leaves.append(leaves)
    seen.counts.append(counts)
    if sum(map(len, seen.inputs)) < KEPT_INPUTS:
        seen.inputs.append(x_TQ[:: max(1, len(x_TQ) // KEPT_INPUTS)][:KEPT_INPUTS].clone())
    if seen.is_first:
        seen.first.append(leaf_TM)
    seen.is_first = False


def _use(seen: _Seen, layer: TreeLinear, shape: tuple[int, ...]) -> LayerUse:
    leaf_V, inverse = torch.unique(torch.cat(seen.leaves), return_inverse=True)
    count_V = torch.zeros(len(leaf_V), dtype=torch.int64).index_add_(0, inverse, torch.cat(seen.counts))
    first = torch.cat(seen.first)
    is_whole = len(first) == math.prod(shape)
    return LayerUse(leaf_V, count_V, torch.cat(seen.inputs)[:KEPT_INPUTS], first.view(*shape, -1) if is_whole else None)


def _examples(task: Task, num_examples: int, count: int) -> Batch:
    """So many of the validation set: of texts, whose windows follow each other in a text, evenly spaced ones."""
    if not isinstance(task, TextTask):
        return task.validation_rows(0, count)
    batches = [task.validation_rows(int(index), 1) for index in np.arange(count) * num_examples // count]
    names = ("inputs", "targets", "lengths")
    inputs, targets, lengths = (np.concatenate([getattr(batch, name) for batch in batches]) for name in names)
    return Batch(inputs, targets, lengths, sum(batch.global_count for batch in batches))
