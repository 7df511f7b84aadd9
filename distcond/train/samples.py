"""What the model makes of the first validation examples: kept at each validation, shown on wandb.

They are taken from the validation as it goes by, so that they cost no pass of their own.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distcond.nn.halting import PonderStats
from distcond.nn.model import Learner

LONGEST = 256
"Positions of an example that are kept."


@dataclass(slots=True)
class Answer:
    """A batch and what the model answers; empty until there is one."""

    given: tuple[Tensor, ...] = ()
    "Inputs, targets and lengths."
    output: tuple[Tensor, PonderStats] | None = None
    "Logits and stats."


@contextmanager
def first_answer(learner: Learner) -> Iterator[Answer]:
    """The first batch that the model is asked about meanwhile, and what it answers."""
    seen = Answer()

    def ask(module: Any, given: tuple[Tensor, ...]) -> None:
        seen.given = seen.given or given

    def answer(module: Any, given: Any, output: tuple[Tensor, PonderStats]) -> None:
        seen.output = seen.output or output

    handles = [learner.register_forward_pre_hook(ask), learner.body.register_forward_hook(answer)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def samples_of(learner: Learner, seen: Answer, number: int) -> list[dict[str, Any]]:
    """The first examples of an answer as JSON: input, target, prediction, wrong (elements), steps of each position.

    Of bytes and tokens also loss and entropy of each position, in bits.

    Of bytes these are texts, what is none in UTF-8 replaced; of vectors lists [T][features] and [T][targets]; of tokens
    ids [T][1].
    """
    if seen.output is None or not number:
        return []
    (inputs, targets, lengths), (logits, stats) = seen.given, seen.output
    steps_BT = stats.steps.view(inputs.shape[:2])
    classes = logits[:number].unflatten(2, (-1, learner.num_classes))
    predicted = classes[..., 0] > 0 if learner.num_classes == 1 else classes.argmax(-1)
    samples = []
    for index in range(min(number, len(inputs))):
        length = min(int(lengths[index]), LONGEST)
        if not length:  # padding
            break
        target, prediction = (part[index, :length].view(length, -1).long().cpu() for part in (targets, predicted))
        wrong = int(((target != prediction) & (target >= 0)).sum())
        texts = [inputs[index, :length], target, prediction]
        is_bytes = learner.is_text and learner.num_classes == 256
        shown = [_text(part) if is_bytes else _numbers(part.view(length, -1)) for part in texts]
        names = dict(zip(("input", "target", "prediction"), shown, strict=True))
        figures = _bits(logits[index, :length], targets[index, :length]) if learner.is_text else {}
        samples.append({"example": index, **names, "wrong": wrong, "steps": steps_BT[index, :length].tolist(), **figures})
    return samples


def _bits(logits_TV: Tensor, targets_T: Tensor) -> dict[str, list[float]]:
    """What the target of each position costs, and what the answer left open: loss and entropy, bits."""
    log_TV = torch.log_softmax(logits_TV.double(), dim=1) / math.log(2)
    loss_T = -log_TV.gather(1, targets_T.long()[:, None])[:, 0]
    entropy_T = -(log_TV.exp2() * log_TV).sum(1)
    return {name: [round(value, 3) for value in part.tolist()] for name, part in (("loss", loss_T), ("entropy", entropy_T))}


def _text(values: Tensor) -> str:
    return bytes(values.flatten().to(torch.uint8).cpu().tolist()).decode("utf-8", "replace")


def _numbers(values: Tensor) -> list[Any]:
    rows: list[list[float]] = values.cpu().tolist()
    return [[int(value) if value == int(value) else round(value, 4) for value in row] for row in rows]
