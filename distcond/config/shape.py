"""What a model needs to know of a task."""

from dataclasses import dataclass
from typing import Protocol


class Shape(Protocol):
    """What a model is built for."""

    @property
    def kind(self) -> str:
        """Either bytes (a classification of each byte, or token) or vectors."""

    @property
    def input_size(self) -> int:
        """256 for bytes, the vocabulary for tokens, else I."""

    @property
    def output_size(self) -> int:
        """256 for bytes, the vocabulary for tokens, else O."""

    @property
    def num_classes(self) -> int:
        """256 for bytes, the vocabulary for tokens; vectors: C, outputs are groups of C, one class each, or 1, binary targets."""

    @property
    def max_length(self) -> int:
        """T, time steps of a batch."""


@dataclass(frozen=True, slots=True)
class TaskShape:
    """The shape of a task, without the task."""

    kind: str
    input_size: int
    output_size: int
    num_classes: int
    max_length: int


def shape_without(task: Shape) -> TaskShape:
    """The shape of a task alone."""
    return TaskShape(task.kind, task.input_size, task.output_size, task.num_classes, task.max_length)
