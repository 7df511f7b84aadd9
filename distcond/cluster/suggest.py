"""What a sweep tries next when Optuna decides (`sweep.search=optuna`): from the trials that have ended, by Ray Tune's adapter.

Optuna knows a list or a choice by the places of its values, which may be of any kind.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from distcond.cluster.search_space import Range, Scale, SearchSpace
from distcond.cluster.sweep_report import Trial
from distcond.errors import ConfigError

MOST_ATTEMPTS = 100
"Suggestions in a row that cannot run before a sweep gives up."


class Suggester(Searcher):  # type: ignore[misc]  # Ray is untyped
    """Hands Tune the trials of an earlier, interrupted run of the sweep first, then new ones, `number` of them in all.

    make: a trial from its number and overrides, or ConfigError. tell: called with each new one. What the earlier trials come
    to, Optuna learns like the rest, when they end.
    """

    def __init__(
        self,
        space: SearchSpace,
        metric: str,
        seed: int,
        number: int,
        past: Sequence[Trial],
        make: Callable[[int, dict[str, Any]], Trial],
        tell: Callable[[Trial], None],
    ) -> None:
        super().__init__(metric=metric, mode="min")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._values = space.grids | {key: kind.values for key, kind in space.ranges.items() if not isinstance(kind, Range)}
        self._ranges = {key: kind for key, kind in space.ranges.items() if isinstance(kind, Range)}
        spread: dict[str, BaseDistribution] = {key: _numbers(kind) for key, kind in self._ranges.items()}
        spread |= {key: CategoricalDistribution(range(len(values))) for key, values in self._values.items()}
        # A search that goes on with its first numbers again would try again what it has tried.
        sampler = optuna.samplers.TPESampler(seed=random.Random(f"{seed}/{len(past)}").getrandbits(32))
        self._search = OptunaSearch(spread, metric=metric, mode="min", sampler=sampler)
        self._past, self._number, self._num_made = deque(past), number, len(past)
        self._make, self._tell = make, tell
        self._repeated: dict[str, Trial] = {}
        self._asked: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """Called by Tune: what a trial is to be told, or that there is none left."""
        if self._past:
            trial = self._repeated[trial_id] = self._past.popleft()
        elif self._num_made < self._number:
            trial = self._new(trial_id)
            self._num_made += 1
            self._tell(trial)
        else:
            return Searcher.FINISHED
        return {"trial": trial.told}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Called by Tune at validations; what counts is the last one."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Called by Tune: tell Optuna what became of it. A trial that failed or diverged is one to stay away from."""
        value = (result or {}).get(self.metric)
        value = None if value is None or not math.isfinite(value) else float(value)
        if trial_id in self._asked:
            given = {} if value is None else {self.metric: value}
            self._search.on_trial_complete(self._asked.pop(trial_id), given, error=value is None)
        elif trial_id in self._repeated and value is not None:
            self._search.add_evaluated_point(self._encoded(self._repeated.pop(trial_id).overrides), value)

    def __getstate__(self) -> dict[str, Any]:
        """NOTE: Tune pickles this, to go on after a crash of its own; `sweep.json` is what a sweep goes on from."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `__getstate__`."""

    def _new(self, trial_id: str) -> Trial:
        """A trial that can run. Suggestions that cannot are told to Optuna as failed."""
        for attempt in range(MOST_ATTEMPTS):
            name = f"{trial_id}/{attempt}"
            overrides = self._decoded(self._search.suggest(name))
            try:
                trial = self._make(self._num_made, overrides)
            except ConfigError as reason:
                error = reason
                self._search.on_trial_complete(name, {}, error=True)
                continue
            self._asked[trial_id] = name
            return trial
        raise ConfigError(f"sweep.space: of {MOST_ATTEMPTS} suggestions none can run; of the last: {error}")

    def _decoded(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        of_lists = {key: values[suggested[key]] for key, values in self._values.items()}
        return of_lists | {key: kind.tidy(suggested[key]) for key, kind in self._ranges.items()}

    def _encoded(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        of_lists = {key: values.index(overrides[key]) for key, values in self._values.items()}
        return of_lists | {key: overrides[key] for key in self._ranges}


def _numbers(kind: Range) -> BaseDistribution:
    is_log = kind.scale == Scale.log
    if kind.is_whole:
        return IntDistribution(int(kind.minimum), int(kind.maximum), log=is_log)
    return FloatDistribution(kind.minimum, kind.maximum, log=is_log)
