"""Which tasks there are, and what every one of them can do."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from distcond.config import TEXTS, DataConfig, DataName
from distcond.data.addition import addition
from distcond.data.batch import Batch
from distcond.data.corpus import Corpus, Run, in_turn
from distcond.data.generated import GeneratedTask
from distcond.data.graves import logic, parity
from distcond.data.hub import open_hub
from distcond.data.mixture import Mixture, allotted
from distcond.data.sort import sort
from distcond.data.text import open_stdlib, open_text
from distcond.data.windows import ByteTask


class Task(Protocol):
    """Examples addressed by index: what a row is depends on the arguments alone, never on what was asked before."""

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

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        """Rows `part` of the global batch `step`, which has `size` rows."""

    def validation_rows(self, start: int, size: int) -> Batch:
        """Rows start..start+size of the fixed validation set."""

    def fingerprint(self) -> dict[str, Any]:
        """What the data is, as JSON, for `environment.json`."""


TextTask = ByteTask | Mixture

GENERATED: dict[DataName, Callable[[DataConfig], GeneratedTask]] = {
    DataName.parity: lambda config: parity(
        config.num_bits,
        scattered=config.scattered,
        set_bits=config.set_bits,
        validation_set_bits=config.validation_set_bits,
    ),
    DataName.logic: lambda config: logic(config.max_length, config.max_gates),
    DataName.addition: lambda config: addition(config.max_length, config.max_digits),
    DataName.sort: lambda config: sort(config.max_length),
}
"The tasks that need no files."


def build_task(config: DataConfig) -> Task:
    """The task that `data.name` names; a text is prepared on first use and opened at once later.

    Raises DataError if there is no text, or too little.
    """
    if config.name in GENERATED:
        return GENERATED[config.name](config)
    if config.name != DataName.mixture:
        return ByteTask(open_source(config), config.context, config.validation_examples)
    parts = config.parts()
    shares = np.array([share for share, _ in parts.values()])
    counts = allotted(shares, config.validation_examples)
    texts = [text for _, text in parts.values()]
    tasks = [ByteTask(open_source(text), text.context, count) for text, count in zip(texts, counts, strict=True)]
    return Mixture(list(parts), shares, tasks)


def bytes_per_token(task: Task, split: str) -> float:
    """Bytes of text that an element of a text stands for, so that bits can be told per byte; 1 for bytes and vectors."""
    return task.bytes_per_token(split) if isinstance(task, TextTask) else 1.0


def texts_of(config: DataConfig) -> list[DataConfig]:
    """The texts that are read: those of a mixture, or this one; none where examples are generated."""
    if config.name == DataName.mixture:
        return [text for _, text in config.parts().values()]
    return [config] if config.name in TEXTS else []


def open_source(config: DataConfig, run: Run = in_turn) -> Corpus:
    """The corpus that `data.name` names, prepared by `run` on first use. Raises DataError as `open_corpus` does."""
    match config.name:
        case DataName.stdlib:
            return open_stdlib(config, run)
        case DataName.text:
            return open_text(config, run)
        case _:
            return open_hub(config, run)
