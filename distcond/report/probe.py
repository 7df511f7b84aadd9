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
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from distcond.data.batch import Batch, select
from distcond.data.tasks import Task, TextTask
from distcond.nn import TreeLinear
from distcond.nn.halting import PonderStats
from distcond.nn.model import Learner
from distcond.train.state import tensors
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
    """What was seen; numpy arrays of all positions, of which `valid_BT` are part of an example."""

    batch: Batch
    valid_BT: np.ndarray
    steps_BT: np.ndarray
    loss_BT: np.ndarray
    "Bits: of the target byte or token, or of all targets of an element."
    entropy_BT: np.ndarray
    "Bits: of the prediction."
    wrong_BT: np.ndarray
    "Whether any target of the element is missed."
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
            parts.append(_answer(learner, batch))
    valid, steps, loss, entropy, wrong = (np.concatenate(part) for part in zip(*parts, strict=True))
    shape = valid.shape
    uses = {name: _use(seen[name], layer, shape) for name, layer in tree_layers(learner).items() if seen[name].leaves}
    return Probe(examples, valid, steps, loss, entropy, wrong, uses)


@torch.no_grad()
def loss_of(learner: Learner, batch: Batch) -> float:
    """Mean bits of an element."""
    valid, _, loss, _, _ = _answer(learner, batch)
    return float(loss[valid].mean())


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


def _answer(learner: Learner, batch: Batch) -> tuple[np.ndarray, ...]:
    """Of each position [B, T]: whether it counts, steps, loss and entropy in bits, whether anything is wrong."""
    inputs, targets, lengths = tensors(batch, torch.device("cpu"))
    logits, stats = _body(learner, inputs, lengths)
    loss, entropy, wrong = _figures(logits.float(), targets, learner.num_classes)
    valid = torch.arange(logits.shape[1]) < lengths[:, None]
    parts = (valid, stats.steps.view(valid.shape), loss / math.log(2), entropy / math.log(2), wrong)
    return tuple(part.numpy() for part in parts)


def _body(learner: Learner, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, PonderStats]:
    answer: tuple[Tensor, PonderStats] = learner.body(inputs, lengths)
    return answer


def _figures(logits_BTO: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and entropy in nats, summed over the targets of a position, and whether any is missed: [B, T] each."""
    if num_classes == 1:
        wanted = targets.float()
        loss = binary_cross_entropy_with_logits(logits_BTO, wanted, reduction="none")
        p = logits_BTO.sigmoid()
        entropy = torch.special.entr(p) + torch.special.entr(1 - p)
        wrong = (logits_BTO > 0) != (wanted > 0.5)
        return loss.sum(2), entropy.sum(2), wrong.any(2)
    classes = targets.long().view(*targets.shape[:2], -1)
    logits = logits_BTO.unflatten(2, (-1, num_classes))
    asked = classes >= 0
    loss = cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none", ignore_index=-1).view_as(classes)
    entropy = torch.where(asked, torch.special.entr(logits.softmax(-1)).sum(-1), 0.0)
    return loss.sum(2), entropy.sum(2), (asked & (logits.argmax(-1) != classes)).any(2)


def _examples(task: Task, num_examples: int, count: int) -> Batch:
    """So many of the validation set: of texts, whose windows follow each other in a text, evenly spaced ones."""
    if not isinstance(task, TextTask):
        return task.validation_rows(0, count)
    batches = [task.validation_rows(int(index), 1) for index in np.arange(count) * num_examples // count]
    names = ("inputs", "targets", "lengths")
    inputs, targets, lengths = (np.concatenate([getattr(batch, name) for batch in batches]) for name in names)
    return Batch(inputs, targets, lengths, sum(batch.global_count for batch in batches))
