"""Where a run that has gone bad went bad: the first tensor that is not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distcond.train.checkpoint_writer import lowest_line
from distcond.train.state import Run, tensors
from distcond.train.table_files import tree_layers


def first_bad_tensor(run: Run) -> str:
    """What is not finite first in the last step, computed once more with an eye on every module; in words. Collective.

    In this order: weights and statistics, inputs, outputs of modules and their gradients as they come about, the loss.
    """
    found = _bad_weight(run)
    step = run.step - 1
    for micro in range(run.config.optim.accumulation):
        batch = tensors(run.feeder.get(step, micro), run.engine.device)
        place = f"micro-batch {micro} of rank {run.engine.tables.world.rank}"
        if not found and _is_bad(batch[0]):
            found = f"the input ({place})"
        with _watched(run.learner) as seen:
            loss, _ = run.engine(*batch)
            if _is_bad(loss):
                seen.append("the loss")
            run.engine.backward(loss)
        if not found and seen:
            found = f"{seen[0]} ({place})"
    answer = lowest_line(run.engine.tables.world, found)
    return answer or "the sum of gradients over micro-batches and ranks, which are finite by themselves"


def _bad_weight(run: Run) -> str:
    named = [*run.learner.named_parameters(), *run.learner.named_buffers()]
    for layer_name, layer in tree_layers(run.learner).items():
        if layer.table is not None:
            named += [(f"{layer_name}, rows of {kind} nodes", store.data) for kind, store in layer.table.stores()]
    return next((f"the weight {name}" for name, value in named if _is_bad(value)), "")


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collects names of what is not finite, in the order of computation."""
    seen: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        what = f"the output of {name or 'the model'} ({type(module).__name__})"

        def look(module: nn.Module, given: Any, output: Any) -> None:
            for value in _tensors_in(output):
                if _is_bad(value):
                    seen.append(what)
                if value.requires_grad:
                    value.register_hook(look_at_gradient)

        def look_at_gradient(grad: Tensor) -> None:
            if _is_bad(grad):
                seen.append(f"the gradient at {what}")

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)


def _is_bad(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(torch.isfinite(value).all())
