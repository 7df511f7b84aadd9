"""The card of an exported model, `model.json`: what is in its folder, sealed, so that whatever was altered is noticed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from distcond.config import ModelConfig
from distcond.errors import RunError
from distcond.finite import finite
from distcond.train.sealing import fingerprint

FORMAT_VERSION = 1
CARD, WEIGHTS, TOKENIZER = "model.json", "model.safetensors", "tokenizer.json"
SEAL = "sha256"
"Of the card's other entries."
AGAIN = "export the run again: distcond export RUN --out DIR"

Section = TypeVar("Section")


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write the card of a folder: its entries, size and sha256 of the other files there, and the seal."""
    files = {file.name: fingerprint(file) for file in sorted(folder.iterdir()) if file.name != CARD}
    entries = finite({"format_version": FORMAT_VERSION, **card, "files": files})
    text = json.dumps({**entries, SEAL: _seal_of(entries)}, indent=2)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a folder whose files are what it says. Raises RunError, naming the file, where one is missing or altered."""
    file = folder / CARD
    try:
        card = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"{folder} is no exported model, for it has no {CARD}; {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged (it is no JSON); {AGAIN}") from error
    if not isinstance(card, dict) or "format_version" not in card:
        raise RunError(f"{file} is damaged (it names no format_version); {AGAIN}")
    if card["format_version"] != FORMAT_VERSION:
        raise RunError(f"{file} has format {card['format_version']}; this version of distcond reads {FORMAT_VERSION}; {AGAIN}")
    if card.pop(SEAL, None) != _seal_of(card):
        raise RunError(f"{file} was altered (its entries have another sha256 than it says); {AGAIN}")
    for name, expected in card["files"].items():
        if not (folder / name).is_file():
            raise RunError(f"{folder / name} is missing; {AGAIN}")
        if fingerprint(folder / name) != expected:
            raise RunError(f"{folder / name} was altered (its sha256 is not what {CARD} says); {AGAIN}")
    return card


def model_config(card: Mapping[str, Any]) -> ModelConfig:
    """The architecture of a card. Raises RunError for entries that are none, and ConfigError for values out of range."""
    try:
        return _section(ModelConfig, card["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{CARD} describes no model that this version knows ({error}); {AGAIN}") from error


def _section(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """A dataclass of the configuration from plain values. Raises TypeError for keys it does not have, ValueError for choices."""
    hints = get_type_hints(kind)
    assert is_dataclass(kind)
    made = dict(values)
    for field in fields(kind):
        hint, value = hints[field.name], values[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            made[field.name] = _section(hint, value)
        elif isinstance(hint, type) and issubclass(hint, StrEnum):
            made[field.name] = hint(value)
    return kind(**made)


def _seal_of(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
