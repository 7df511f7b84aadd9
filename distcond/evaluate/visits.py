"""Which leaves the positions of a validation set visit, step by step.

Legend: B examples of a batch, T positions, R rows of a layer, M trees.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distcond.nn import FixedComputation, TreeLinear
from distcond.nn.halting import Pondering
from distcond.train.table_files import tree_layers


class Visited(NamedTuple):
    """Visits of one layer: a position in one of its ponder steps, at one of the trees. Each [V], in no order that matters."""

    position: np.ndarray
    "int64: example x T + place in it."
    leaf: np.ndarray
    "int64: tree << depth | leaf."


class VisitRecorder:
    """Listens to the tree layers of a model while it is asked; nothing is heard of one whose rows are not positions.

    Rows are taken for those of the halting module around the layer, or, outside of any, for all positions in their order.
    """

    def __init__(self, body: nn.Module) -> None:
        self._layers = tree_layers(body)
        self._found: dict[str, list[Visited]] = {name: [] for name in self._layers}
        self._unknown: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._places: Tensor | None = None
        self._first, self._of_batch = 0, dict[str, list[tuple[Tensor, Tensor]]]()
        if self._layers:
            self._listen(body)

    def start(self, lengths: Tensor, length: int) -> None:
        """Before each batch; lengths int64 [B]."""
        self._lengths, self._length = lengths, length
        self._valid = (torch.arange(length) < lengths[:, None]).flatten()
        self._begun: Tensor | None = None
        self._places, self._calls = None, 0
        self._of_batch = {name: [] for name in self._layers}

    def end(self, size: int) -> None:
        """After each batch, of which the first `size` examples count."""
        for name, parts in self._of_batch.items():
            for places_R, leaf_RM in parts:
                is_counted_R = self._valid[places_R]
                position = (self._first * self._length + places_R[is_counted_R])[:, None].expand(-1, leaf_RM.shape[1])
                self._found[name].append(Visited(position.flatten().numpy(), leaf_RM[is_counted_R].flatten().numpy()))
        self._first += size

    def visited(self) -> dict[str, Visited]:
        """All visits, by the name of the layer; without layers of which it is not known whose rows they got."""
        known = {name: parts for name, parts in self._found.items() if parts and name not in self._unknown}
        return {name: Visited(*map(np.concatenate, zip(*parts, strict=True))) for name, parts in known.items()}

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def _listen(self, body: nn.Module) -> None:
        for name, layer in self._layers.items():
            self._handles.append(
                layer.register_forward_pre_hook(lambda module, given, name=name: self._visit(name, module, given))
            )
        for module in body.modules():
            if isinstance(module, Pondering | FixedComputation) and isinstance(module.cell, nn.Module):
                self._handles.append(module.register_forward_pre_hook(self._begin))
                self._handles.append(module.register_forward_hook(self._leave))
                self._handles.append(module.cell.register_forward_pre_hook(self._step))

    def _begin(self, module: Any, given: tuple[Any, ...]) -> None:
        """A halting module is given rows, in one go or time step by time step: whose they are."""
        number, call = len(given[0]), self._calls
        inside, running = self._valid.nonzero()[:, 0], (self._lengths > call).nonzero()[:, 0]
        if number == len(self._valid):
            self._begun = torch.arange(number)
        elif number == len(inside):
            self._begun = inside
        else:
            self._begun = running * self._length + call if number == len(running) and call < self._length else None
        self._calls += 1

    def _step(self, module: Any, given: tuple[Any, ...]) -> None:
        self._places = None if self._begun is None else self._begun[given[2]]

    def _leave(self, module: Any, given: Any, output: Any) -> None:
        self._begun = self._places = None

    def _visit(self, name: str, layer: TreeLinear, given: tuple[Tensor, ...]) -> None:
        leaf_RM = layer.leaf(given[0]).view(-1, layer.num_trees)
        places = self._places
        if places is None and len(leaf_RM) == len(self._valid):
            places = torch.arange(len(leaf_RM))
        if places is None or len(places) != len(leaf_RM):
            self._unknown.add(name)
            return
        self._of_batch[name].append((places, leaf_RM + (torch.arange(layer.num_trees) << layer.depth)))
