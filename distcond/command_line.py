"""A configuration as the line that a person would type for it."""

import functools
import re
import shlex
from collections.abc import Mapping
from typing import Any

from distcond.compose import compose, override, to_dict
from distcond.config import Config


def train_line(config: Config, changes: Mapping[str, Any]) -> str:
    """`distcond train ...` that composes this configuration with some dotted keys changed, quoted for a shell."""
    words = overrides_of(override(config, changes))
    return shlex.join(["distcond", "train", *words])


def overrides_of(config: Config) -> list[str]:
    """What is not as `distcond train` composes it without a word, as overrides in Hydra's grammar."""
    default, wanted = _default(), _flat(to_dict(config))
    return [f"{key}={_text(value)}" for key, value in wanted.items() if key not in default or default[key] != value]


@functools.cache
def _default() -> Mapping[str, Any]:
    """What `distcond train` composes without a word; it takes 0.3 s."""
    return _flat(to_dict(compose([])))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, part in value.items():
        # An empty mapping is a value: there is nothing below it.
        flat |= _flat(part, f"{prefix}{key}.") if isinstance(part, Mapping) and part else {prefix + key: part}
    return flat


def _text(value: Any) -> str:
    """A value in Hydra's grammar, in which quoted text alone means itself whatever is in it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_text(part)}" for key, part in value.items()) + "}"
    if not isinstance(value, str):
        return repr(value)
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_-]*", value) and value.lower() not in _WORDS:
        return value
    # NOTE: in quotes, backslashes count as themselves unless they stand before a quote or at the end.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


_WORDS = {"null", "true", "false", "inf", "nan"}
"Words that would be read as something else than text."
