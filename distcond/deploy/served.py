"""A model that answers on the command line: opened from an export or a run, with what turns lines into its inputs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distcond.config.shape import shape_without
from distcond.data.tokens import decoder, encoder
from distcond.deploy.card import CARD, TOKENIZER
from distcond.deploy.load import Deployed, load
from distcond.errors import ConfigError, DataError, RunError
from distcond.opened import OpenedRun, open_run


@dataclass(frozen=True, slots=True)
class Served:
    """A model, and what its inputs and outputs are for people."""

    model: Deployed
    unit: str
    "bytes or tokens of text; ids: of a vocabulary without a text; vectors."
    tokenizer: str = ""
    "Its file."

    def ids_of(self, text: str) -> list[int]:
        """A text as the model reads it."""
        if self.unit == "tokens":
            return [int(token) for token in encoder(self.tokenizer)(text.encode(), "")]
        return list(text.encode())

    def text_of(self, ids: list[int]) -> Any:
        """What the model wrote; bytes that are no UTF-8 become U+FFFD."""
        if self.unit == "ids":
            return ids
        return decoder(self.tokenizer)(ids) if self.unit == "tokens" else bytes(ids).decode("utf-8", "replace")


def serve(path: Path, step: int | None = None) -> Served:
    """The model of an exported folder, or of a run. Raises RunError where it is neither, and as `load` and `open_run` do."""
    if (path / CARD).is_file():
        if step is not None:
            raise ConfigError(f"--step {step} chooses a checkpoint, but {path} is an exported model of one; leave it out.")
        model = load(path)
        tokenizer = path / TOKENIZER
        return Served(model, _unit(model, tokenizer.is_file()), str(tokenizer))
    if not (path / "config.yaml").is_file():
        raise RunError(
            f"{path} is neither a run (it has no config.yaml) nor an exported model (it has no {CARD}); give one of them."
        )
    return serve_run(open_run(path, step))


def serve_run(opened: OpenedRun) -> Served:
    """The model of a run."""
    model = Deployed(opened.learner.body, shape_without(opened.feeder.task), {})
    tokenizer = opened.config.data.tokenizer
    return Served(model, _unit(model, bool(tokenizer)), tokenizer)


def _unit(model: Deployed, has_tokenizer: bool) -> str:
    if model.shape.kind == "vectors":
        return "vectors"
    return "tokens" if has_tokenizer else "bytes" if model.shape.num_classes == 256 else "ids"


def parse_json(text: str, where: str) -> Any:
    """The value of a line. Raises DataError for what is no JSON, NaN and Infinity included."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON ({error}); quote texts, and write one value a line.") from error


def prompt_of(served: Served, value: Any, where: str) -> list[int]:
    """The ids of a prompt: of a text, or, without a text, of a list of ids. Raises DataError for any other value."""
    if served.unit == "ids":
        size = served.model.shape.input_size
        if not isinstance(value, list) or not value or not all(type(one) is int and 0 <= one < size for one in value):
            raise DataError(f"{where}: needed is a list of ids, each from 0 to {size - 1}.")
        return value
    if not isinstance(value, str) or not value:
        raise DataError(f'{where}: needed is a text, as "def main(".')
    try:
        ids = served.ids_of(value)
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise DataError(f"{where} is no text ({error.reason}); give whole characters.") from error
    if not ids:
        raise DataError(f"{where} has no token; give a longer text.")
    return ids


def vectors_of(value: Any, input_size: int, where: str) -> Tensor:
    """One vector, or one for each time step, float32 [T, I]; also as {"inputs": ...}. Raises DataError for any other value."""
    value = value.get("inputs") if isinstance(value, dict) else value
    rows = [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where}: needed is a vector of {input_size} numbers, or a list of such, one for each time step.")
    for place, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != input_size or not all(map(_is_number, row)):
            given = f"{len(row)} values" if isinstance(row, list) else json.dumps(row)[:40]
            raise DataError(f"{where}: time step {place} is {given}; needed is a vector of {input_size} finite numbers.")
    return torch.tensor(rows, dtype=torch.float32)


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and abs(value) < 1e30  # which neither NaN nor an integer beyond floats is


def check_answer(logits: Tensor) -> None:
    """Refuse numbers that mean nothing. Raises RunError."""
    if not bool(logits.isfinite().all()):
        raise RunError(
            "the model answers with numbers that are NaN or infinite; use an earlier checkpoint (--step N), or train it again "
            "with a lower optim.lr"
        )


def _refuse(name: str) -> Callable[[], None]:
    raise ValueError(f"{name} is no number")
