"""Which tasks there are, and what every one of them can do."""

from typing import Any, Protocol

from distcond.config import DataConfig, DataName
from distcond.data.batch import Batch
from distcond.data.graves import logic, parity
from distcond.data.hub import open_hub
from distcond.data.text import open_stdlib, open_text
from distcond.data.windows import ByteTask


class Task(Protocol):
    """Examples addressed by index: what a row is depends on the arguments alone, never on what was asked before."""

    @property
    def kind(self) -> str:
        """Either bytes (a classification of each byte) or vectors (independent binary targets)."""

    @property
    def input_size(self) -> int:
        """256 for bytes, else I."""

    @property
    def output_size(self) -> int:
        """256 for bytes, else O."""

    @property
    def max_length(self) -> int:
        """T, time steps of a batch."""

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        """Rows `part` of the global batch `step`, which has `size` rows."""

    def validation_rows(self, start: int, size: int) -> Batch:
        """Rows start..start+size of the fixed validation set."""

    def fingerprint(self) -> dict[str, Any]:
        """What the data is, as JSON, for `environment.json`."""


def build_task(config: DataConfig) -> Task:
    """The task that `data.name` names; a text is prepared on first use and opened at once later.

    Raises DataError if there is no text, or too little.
    """
    match config.name:
        case DataName.parity:
            return parity(config.num_bits)
        case DataName.logic:
            return logic(config.max_length, config.max_gates)
        case DataName.stdlib:
            corpus = open_stdlib(config)
        case DataName.text:
            corpus = open_text(config)
        case DataName.hf:
            corpus = open_hub(config)
    return ByteTask(corpus, config.context, config.validation_examples)
