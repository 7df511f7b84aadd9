"""What it takes to keep a model: settings of its own, other seeds that came out as well, time to train it again."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from distcond.compose import draft, to_dict
from distcond.config import Config, DataName
from distcond.train.run_folder import RunFolder, find_parent, flat

WHERE = ("run", "tracking", "sweep", "seed")
"Sections that say where a run is kept and shown, and its seed: not what it is."
WHERE_KEYS = ("data.cache_dir",)
GROUPS = ("model", "data")
"Whose options set several keys at once; which option it is, is one setting."


def upkeep(folder: RunFolder, config: Config, step: int, metric: str) -> dict[str, Any]:
    """maintainability/settings_changed, /num_settings_changed, /seeds, /num_seeds_finished, /retrain_s, /parents.

    retrain_s: with the time of the runs that it grew from, which are `parents` (`parents_of`); left out where the metrics of
    one of them are gone, or its own. step: of the checkpoint. metric: the figure of quality that `summary.json` ends with.
    """
    changed, seeds = settings_changed(config), seeds_beside(folder, metric)
    figures = {
        "settings_changed": changed,
        "num_settings_changed": len(changed),
        "seeds": seeds,
        "num_seeds_finished": sum(seed["finished"] for seed in seeds.values()),
    }
    seconds = [seconds_of_training(folder.metrics, step)]
    if parents := parents_of(folder, config):
        figures["parents"] = parents
        seconds += [parent["train_s"] for parent in parents]
    if all(seconds):
        figures["retrain_s"] = sum(seconds)
    return {f"maintainability/{name}": value for name, value in figures.items()}


def settings_changed(config: Config) -> dict[str, Any]:
    """Dotted keys whose values are not those of `distcond train` with the same options of GROUPS, and the values.

    An option other than the default one counts as a key: model=rnn. Sections of WHERE do not count.
    """
    default = _composed()
    names = {group: str(getattr(config, group).name) for group in GROUPS}
    chosen = {group: name for group, name in names.items() if name != default[f"{group}.name"]}
    has_file = {"model": config.model.is_shipped, "data": config.data.name in {*DataName}}
    before = _composed(*(f"{group}={name}" for group, name in chosen.items() if has_file[group]))
    own = flat(to_dict(config))
    keys = sorted(own.keys() | before.keys())
    return chosen | {key: own.get(key) for key in keys if own.get(key) != before.get(key) and not _is_where(key)}


@cache
def _composed(*options: str) -> dict[str, Any]:
    """What these options of groups give, by dotted key."""
    return flat(draft(options))


def seeds_beside(folder: RunFolder, metric: str) -> dict[str, dict[str, Any]]:
    """Runs in the same folder, this one included, whose config.yaml differs in no section outside of WHERE, by their seed.

    Of each its `run` (name), `quality` at its end, and whether it `finished`: reached train.max_steps. Of runs with the same
    seed, the last one by name that finished counts.
    """
    mine = _sections(folder.config_file)
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.path.resolve().parent.glob("*/config.yaml")):
        theirs = _sections(file) if file.is_file() else {}
        if {**theirs, **dict.fromkeys(WHERE)} != {**mine, **dict.fromkeys(WHERE)}:
            continue
        seed, steps = theirs.get("seed", "").strip(), re.search(r"^  max_steps: (\d+)$", theirs.get("train", ""), re.MULTILINE)
        summary = RunFolder(file.parent).summary()
        finished = steps is not None and summary.get("step") == int(steps[1]) and not summary.get("stopped")
        if finished or seed not in found:
            last = summary.get("last")
            quality = last.get(metric) if isinstance(last, dict) else None
            found[seed] = {"run": file.parent.name, "quality": quality, "finished": finished}
    return found


def parents_of(folder: RunFolder, config: Config) -> list[dict[str, Any]]:
    """The run that this one started from (`train.init_from`), the one which that started from, and so on.

    Of each its folder `run`, the `step` whose weights were taken, and `train_s`, seconds of training up to there; None: not
    known, for the run is gone or lacks its files. With such a one the list ends.
    """
    given = folder.summary().get("init_from")
    if given is None and config.train.init_from:
        given = {"run": config.train.init_from, "step": None}
    parents: list[dict[str, Any]] = []
    while given is not None and all(given["run"] != parent["run"] for parent in parents):
        parent = find_parent(folder, Path(given["run"]))
        is_whole = parent is not None and given["step"] is not None and parent.summary_file.is_file()
        seconds = seconds_of_training(parent.metrics, given["step"]) if parent and is_whole else 0.0
        parents.append({"run": given["run"], "step": given["step"], "train_s": seconds or None})
        if parent is None or not seconds:
            break
        folder, given = parent, parent.summary().get("init_from")
    return parents


def seconds_of_training(metrics: Path, step: int) -> float:
    """Of the steps up to this one and the validations between them, by `metrics.jsonl`; without start and checkpoints.

    0 where there is none.
    """
    total, done = 0.0, 0
    for line in metrics.read_text(errors="replace").splitlines() if metrics.is_file() else []:
        try:
            row = json.loads(line)
            if row["step"] > step:
                break
            total += row.get("perf/validation_s", 0.0)
            if "perf/step_ms" in row:
                total, done = total + row["perf/step_ms"] / 1e3 * (row["step"] - done), row["step"]
        except (ValueError, KeyError, TypeError, RecursionError):  # a line that a crash has cut off
            continue
    return total


def _is_where(key: str) -> bool:
    return key.partition(".")[0] in WHERE or key in WHERE_KEYS


def _sections(file: Path) -> dict[str, str]:
    """Text of each section of a config.yaml as distcond writes it."""
    return dict(re.findall(r"^(\w+):(.*(?:\n[ -].*)*)", file.read_text(errors="replace"), re.MULTILINE))
