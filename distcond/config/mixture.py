"""What a source of a mixture may say of itself."""

import math
from collections.abc import Mapping
from typing import Any

from distcond.config.check import need
from distcond.config.choices import TEXTS, DataName

SETTINGS: dict[str, type] = {"path": str, "subset": str, "column": str, "validation_fraction": float, "files": list}
"Of a source, beside name and weight; what it leaves out is as in `data`."
EXAMPLE = "{code: {name: stdlib, weight: 3}, prose: {name: text, files: [a.txt], weight: 1}}"


def checked_sources(sources: Mapping[str, Any]) -> dict[str, tuple[float, dict[str, Any]]]:
    """Source -> weight, and settings that replace those of `data`. Raises ConfigError for what makes no mixture."""
    need(bool(sources), f"data.sources is empty; a mixture has some, e.g. data.sources={EXAMPLE}.")
    checked = {str(source): _checked(f"data.sources.{source}", given) for source, given in sources.items()}
    need(
        any(weight for weight, _ in checked.values()),
        f"data.sources: the weights of {', '.join(checked)} are all 0; give one of them a weight above 0.",
    )
    total = sum(weight for weight, _ in checked.values())
    need(math.isfinite(total), f"data.sources: the weights of {', '.join(checked)} sum up to infinity; divide them by a number.")
    return checked


def _checked(key: str, given: Any) -> tuple[float, dict[str, Any]]:
    need(isinstance(given, Mapping), f"{key}={given}: needed is a mapping, e.g. {{name: text, files: [a.txt], weight: 1}}.")
    unknown = [name for name in given if name not in {"name", "weight", *SETTINGS}]
    need(not unknown, f"{key}: there is no key {unknown and unknown[0]}; a source has name, weight, {', '.join(SETTINGS)}.")
    texts = sorted(TEXTS - {DataName.mixture})
    need(given.get("name") in texts, f"{key}.name={given.get('name')}: needed is one of {', '.join(texts)}.")
    for name, kind in SETTINGS.items():
        value = given.get(name, kind())
        need(_is_a(value, kind), f"{key}.{name}={value}: needed is {_NEEDS[kind]}.")
    weight = given.get("weight")
    need(
        _is_a(weight, float) and math.isfinite(weight) and weight >= 0,
        f"{key}.weight={weight}: needed is a number, 0 or more; weights count relative to each other.",
    )
    settings = {name: given[name] for name in SETTINGS if name in given}
    return float(weight), {"name": DataName(given["name"]), **settings}


_NEEDS = {str: "text", float: "a number", list: "a list of texts [a,b]"}


def _is_a(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
