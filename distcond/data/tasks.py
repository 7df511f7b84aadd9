"""Which tasks there are, and what every one of them can do."""

from collections.abc import Callable
from typing import Any, Protocol

from distcond.config import DataConfig, DataName
from distcond.data.addition import addition
from distcond.data.batch import Batch
from distcond.data.corpus import Corpus, Run, in_turn
from distcond.data.generated import GeneratedTask
from distcond.data.graves import logic, parity
from distcond.data.hub import open_hub
from distcond.data.sort import sort
from distcond.data.text import open_stdlib, open_text
from distcond.data.windows import ByteTask


class Task(Protocol):
    """Examples addressed by index: what a row is depends on the arguments alone, never on what was asked before."""

    @property
    def kind(self) -> str:
        """Either bytes (a classification of each byte) or vectors."""

    @property
    def input_size(self) -> int:
        """256 for bytes, else I."""

    @property
    def output_size(self) -> int:
        """256 for bytes, else O."""

    @property
    def num_classes(self) -> int:
        """256 for bytes; C: vectors whose outputs are groups of C, one class each; 1: independent binary targets."""

    @property
    def max_length(self) -> int:
        """T, time steps of a batch."""

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        """Rows `part` of the global batch `step`, which has `size` rows."""

    def validation_rows(self, start: int, size: int) -> Batch:
        """Rows start..start+size of the fixed validation set."""

    def fingerprint(self) -> dict[str, Any]:
        """What the data is, as JSON, for `environment.json`."""


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
    return ByteTask(open_source(config), config.context, config.validation_examples)


def open_source(config: DataConfig, run: Run = in_turn) -> Corpus:
    """The corpus that `data.name` names, prepared by `run` on first use. Raises DataError as `open_corpus` does."""
    match config.name:
        case DataName.stdlib:
            return open_stdlib(config, run)
        case DataName.text:
            return open_text(config, run)
        case _:
            return open_hub(config, run)
