"""What a sweep tries: from `sweep.space` to the overrides of every trial.

Pure: everything is decided before anything starts, so that a bad space is refused at once and a trial can be repeated
by its overrides alone.
"""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from distcond.errors import ConfigError

RESERVED_KEYS = (
    "run",
    "sweep",
    "train.init_from",
    "train.max_steps",
    "train.eval_every",
    "cluster.name",
    "cluster.address",
    "tracking.group",
)
"Keys (or their parents) that all trials share: the sweep's own, and the steps at which trials are compared."
SIGNIFICANT_DIGITS = 4
"Sampled floats are rounded to this many digits, so that a trial can be typed again."


class Scale(StrEnum):
    """How a range is sampled."""

    linear = "linear"
    log = "log"


@dataclass(frozen=True, slots=True)
class Range:
    """An interval, both ends included; whole numbers if both ends are."""

    minimum: float
    maximum: float
    scale: Scale

    def sample(self, generator: random.Random) -> float:
        """One value of the interval: int if both ends are ints, else a float of few digits."""
        if self.scale == Scale.log:
            value = math.exp(generator.uniform(math.log(self.minimum), math.log(self.maximum)))
        else:
            value = generator.uniform(self.minimum, self.maximum)
        return self.tidy(value)

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.minimum, int) and isinstance(self.maximum, int)

    def tidy(self, value: float) -> float:
        """A value of the interval as a trial has it."""
        if self.is_whole:
            return int(min(max(round(value), self.minimum), self.maximum))
        return min(max(float(f"{value:.{SIGNIFICANT_DIGITS}g}"), float(self.minimum)), float(self.maximum))

    def holds(self, value: Any) -> bool:
        """Whether it is one of its values."""
        kinds = int if self.is_whole else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and self.minimum <= value <= self.maximum


@dataclass(frozen=True, slots=True)
class Choice:
    """Values of which every sample takes one, all equally likely."""

    values: list[Any]

    def sample(self, generator: random.Random) -> Any:
        """One of the values."""
        return generator.choice(self.values)

    def holds(self, value: Any) -> bool:
        """Whether it is one of the values."""
        return value in self.values


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """A parsed `sweep.space`: for every dotted key a grid, or a range or choice that is sampled."""

    grids: dict[str, list[Any]]
    ranges: dict[str, Range | Choice]

    @property
    def kinds(self) -> dict[str, Range | Choice]:
        """What every key is to have; a grid as its values."""
        return {key: Choice(values) for key, values in self.grids.items()} | self.ranges

    def lacks(self, point: Mapping[str, Any]) -> list[str]:
        """The keys of a point of all keys whose values are not in the space."""
        return [key for key, kind in self.kinds.items() if not kind.holds(point[key])]


def parse_space(space: Mapping[str, Any]) -> SearchSpace:
    """Tell grids from ranges and choices.

    Raises ConfigError for an empty space, a key that is not a trial's to choose, or a value that is neither.
    """
    if not space:
        raise ConfigError("sweep.space is empty; choose one (sweep=depth_x_penalty) or give keys, e.g. model.tree.depth: [2, 4].")
    grids: dict[str, list[Any]] = {}
    ranges: dict[str, Range | Choice] = {}
    for key, values in space.items():
        if any(key == reserved or key.startswith(f"{reserved}.") for reserved in RESERVED_KEYS):
            raise ConfigError(f"sweep.space has {key}, which is not a trial's to choose; remove it.")
        if isinstance(values, Mapping) and values.keys() == {"choice"}:
            ranges[key] = Choice(_parse_grid(key, values["choice"]))
        elif isinstance(values, Mapping):
            ranges[key] = _parse_range(key, values)
        else:
            grids[key] = _parse_grid(key, values)
    return SearchSpace(grids, ranges)


def _parse_grid(key: str, values: Any) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(
            f"sweep.space: {key}={values!r} is neither a list of values nor a range; "
            "use [a, b], {min: a, max: b, scale: log} or {choice: [a, b]}."
        )
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"sweep.space: {key} has {value!r} twice; a grid holds each value once.")
    return list(values)


def _parse_range(key: str, values: Mapping[str, Any]) -> Range:
    unknown = [name for name in values if name not in {"min", "max", "scale"}]
    if unknown or "min" not in values or "max" not in values:
        raise ConfigError(
            f"sweep.space: {key}={dict(values)} is not a range; it needs min and max, and may have scale, or choice alone."
        )
    low, high, scale = values["min"], values["max"], values.get("scale", Scale.linear)
    if any(isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end) for end in (low, high)):
        raise ConfigError(f"sweep.space: {key} has min={low!r}, max={high!r}; both must be numbers.")
    if low >= high:
        raise ConfigError(f"sweep.space: {key} has min={low} and max={high}; min must be below max.")
    if scale not in set(Scale):
        raise ConfigError(f"sweep.space: {key} has scale={scale!r}; use linear or log.")
    if scale == Scale.log and low <= 0:
        raise ConfigError(f"sweep.space: {key} has min={low}; a logarithmic range starts above 0.")
    return Range(low, high, Scale(scale))


def plan_trials(space: SearchSpace, num_samples: int, seed: int) -> list[dict[str, Any]]:
    """The overrides of every trial: each of `num_samples` samples of the ranges crossed with the whole grid.

    A pure function of its arguments; a key's samples do not depend on the other keys of the space.
    """
    if num_samples > 1 and not space.ranges:
        raise ConfigError(
            f"sweep.num_samples={num_samples} would repeat the same trials, for sweep.space has nothing to sample; "
            f"use 1, or repeat with other seeds: seed: [{', '.join(map(str, range(min(num_samples, 3))))}]."
        )
    generators = {key: random.Random(f"{seed}/{key}") for key in space.ranges}
    samples = [{key: space.ranges[key].sample(generators[key]) for key in space.ranges} for _ in range(num_samples)]
    cells = [dict(zip(space.grids, values, strict=True)) for values in itertools.product(*space.grids.values())]
    return [{**cell, **sample} for sample in samples for cell in cells]


def corners(space: SearchSpace) -> list[dict[str, Any]]:
    """A few points of a space that hold each value of a list or choice, and both ends of each range, at least once."""
    values = {key: _values_of(kind) for key, kind in space.kinds.items()}
    number = max(map(len, values.values()))
    return [{key: listed[index % len(listed)] for key, listed in values.items()} for index in range(number)]


def _values_of(kind: Range | Choice) -> list[Any]:
    if isinstance(kind, Range):
        return [kind.tidy(kind.minimum), kind.tidy(kind.maximum)]
    return kind.values
