"""A model run again with one thing changed at one position: a bit of its tree layer, or the number of its steps.

Legend: B copies of a sequence, each with a change of its own, T positions, R rows running, Q in, P out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distcond.deploy.attribution import attribute
from distcond.nn import FixedComputation, PonderStats, TreeLinear
from distcond.nn.halting import Pondering
from distcond.nn.recurrent import Recurrent

TOGETHER = 32
"Copies that are run at once."


@dataclass(frozen=True, slots=True)
class Flip:
    """A bit of a tree, changed at one ponder step; the bits below stay as they are."""

    step: int
    "From 1."
    tree: int
    level: int
    "From 1, the coarsest bit."


@dataclass(frozen=True, slots=True)
class Change:
    """What differs from the model as it is, at the position; nothing unless said."""

    flip: Flip | None = None
    halt_at: int | None = None
    "The step at which the position halts, whatever its halting unit says."


@dataclass(slots=True)
class Outcome:
    """What came out for the position of one copy."""

    logits: Tensor
    "[outputs]."
    steps: int
    inputs: list[Tensor] = field(default_factory=list)
    "Of the tree layer at each step, [Q]."
    outputs: list[Tensor] = field(default_factory=list)
    "Of the tree layer at each step, [P], changes included."


def ponder_of(body: nn.Module) -> Pondering | FixedComputation:
    """The halting module of a model that ships with distcond."""
    (ponder,) = (module for module in body.modules() if isinstance(module, Pondering | FixedComputation))
    return ponder


@torch.no_grad()
def run_changed(
    body: nn.Module, layer: TreeLinear | None, inputs: Tensor, position: int, changes: Sequence[Change], natural: int = 0
) -> list[Outcome]:
    """The outcome of each change at a position of one sequence: inputs [T] or [T, I].

    natural: steps of the position when nothing is changed, where any change has halt_at.
    """
    outcomes: list[Outcome] = []
    for start in range(0, len(changes), TOGETHER):
        some = changes[start : start + TOGETHER]
        copies = inputs[None].expand(len(some), *inputs.shape)
        with _Watch(body, layer, len(inputs), position, some, natural) as watch:
            logits, stats = body(copies, torch.full((len(some),), len(inputs)))
        outcomes += watch.outcomes(logits, stats)
    return outcomes


class _Watch:
    """Hooks that find the position's row in each call of the cell, keep what its layer does there, and make the changes.

    The cell is called once a step on rows still running; an RNN begins anew at each time step, with a row a sequence.
    """

    def __init__(
        self,
        body: nn.Module,
        layer: TreeLinear | None,
        length: int,
        position: int,
        changes: Sequence[Change],
        natural: int,
    ) -> None:
        self._changes, self._natural = changes, natural
        self._position, self._length = position, length
        self._is_recurrent = isinstance(body, Recurrent)
        self._time, self._step = -1, 0
        self._rows: list[tuple[int, int]] = []
        "Copy, and its row in the present call of the cell."
        self._seen: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in changes]
        ponder = ponder_of(body)
        self._handles = [
            ponder.register_forward_pre_hook(self._begin),
            ponder.cell.register_forward_pre_hook(self._find),  # type: ignore[attr-defined]
        ]
        if layer is not None:
            self._handles.append(layer.register_forward_hook(self._flip))
        if isinstance(ponder, Pondering):
            self._handles.append(ponder.halting.register_forward_hook(self._halt))

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def outcomes(self, logits: Tensor, stats: PonderStats) -> list[Outcome]:
        """Of each copy."""
        steps = stats.steps.view(logits.shape[:2])[:, self._position].tolist()
        parts = zip(logits[:, self._position], steps, self._seen, strict=True)
        return [Outcome(last, number, *seen) for last, number, seen in parts]

    def _begin(self, ponder: nn.Module, given: Any) -> None:
        self._time, self._step = self._time + 1, 0

    def _find(self, cell: nn.Module, given: tuple[Any, ...]) -> None:
        self._step += 1
        self._rows = []
        if self._is_recurrent and self._time != self._position:
            return
        place_of = {place: row for row, place in enumerate(given[2].tolist())}
        for copy in range(len(self._changes)):
            place = copy if self._is_recurrent else copy * self._length + self._position
            if place in place_of:
                self._rows.append((copy, place_of[place]))

    def _flip(self, layer: TreeLinear, given: tuple[Tensor], output: Tensor) -> Tensor:
        output = output.clone()
        for copy, row in self._rows:
            x_1Q, flip = given[0][row : row + 1], self._changes[copy].flip
            if flip is not None and flip.step == self._step:
                leaf_1M = layer.leaf(x_1Q)
                leaf_1M[0, flip.tree] ^= 1 << (layer.depth - flip.level)
                output[row] = attribute(layer, x_1Q, leaf_1M).output[0]
            self._seen[copy][0].append(x_1Q[0].clone())
            self._seen[copy][1].append(output[row].clone())
        return output

    def _halt(self, unit: nn.Module, given: tuple[Tensor], probability: Tensor) -> Tensor:
        """Before the step, what the unit says up to the natural end, and nothing after; at the step, all that is left."""
        probability = probability.clone()
        for copy, row in self._rows:
            last = self._changes[copy].halt_at
            if last is not None and self._step >= min(last, self._natural):
                probability[row] = float(self._step == last)
        return probability
