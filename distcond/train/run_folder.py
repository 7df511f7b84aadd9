"""The run folder: the contract between commands, and who may write to it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import shlex
import time
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from distcond.config import Config
from distcond.errors import RunError
from distcond.finite import finite

MAY_CHANGE = (
    "train.",
    "checkpoint.",
    "tracking.",
    "cluster.",
    "sweep.",
    "run.",
    "optim.zero_stage",
    "data.cache_dir",
)
"Keys, by prefix, that may differ when a run is continued: length, logging, workers, ZeRO stage."
MUST_STAY = frozenset({"train.init_from"})
"Keys among those that may not: they decide results."
RANKS_POLL_S = 0.1
ELSEWHERE = "choose another run.dir or run.name."


class RunFolder:
    """Names of what a run writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.environment_file = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.stop_file = path / "stop"
        self.lock_file = path / "lock"
        self.ranks_file = path / "logs" / "ranks"

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """That of a named configuration."""
        return cls(Path(config.run.dir) / config.run.name)

    def summary(self) -> dict[str, Any]:
        """What the last checkpoint left of figures; empty where there was none, or it cannot be read."""
        try:
            value = json.loads(self.summary_file.read_text(errors="replace"))
        except (OSError, ValueError, RecursionError):
            value = None
        return value if isinstance(value, dict) else {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second process; a lock dies with its holder. Raises RunError where it is held."""
        self.check_writable()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.lock_file.open("a+")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written to ({error.strerror}); {ELSEWHERE}") from error
        with file as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as busy:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise RunError(f"{self.path} is being written by {holder}; wait for it, or use another run.name.") from busy
            lock.truncate(0)
            lock.write(_this_process())
            lock.flush()
            yield

    def check_writable(self) -> None:
        """Refuse a folder in which nothing can be written. Raises RunError."""
        check_writable(self.path, ELSEWHERE)

    def is_begun(self) -> bool:
        """Whether anything was trained here: a run that was stopped while it started may still become another one."""
        return self.metrics.exists() or any(self.checkpoints.glob("*"))

    def is_held(self) -> bool:
        """Whether a command is writing to the folder; asking changes nothing in it."""
        try:
            with self.lock_file.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Mark this process as a rank that writes into the folder; the mark dies with the process."""
        self.ranks_file.parent.mkdir(exist_ok=True)
        with self.ranks_file.open("a") as ranks:
            fcntl.flock(ranks, fcntl.LOCK_SH)
            ranks.write(f"{_this_process()}\n")
            ranks.flush()
            yield

    def wait_for_ranks(self, timeout_s: float) -> None:
        """Wait until no rank writes any more: those of a killed command end a moment after it. Raises RunError if they do not."""
        if not self.ranks_file.exists():
            return
        end = time.monotonic() + timeout_s
        with self.ranks_file.open("r+") as ranks:
            while True:
                try:
                    fcntl.flock(ranks, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    ranks.truncate(0)
                    return
                except OSError as busy:
                    if time.monotonic() > end:
                        who = ", ".join(ranks.read().splitlines())
                        line = f"{self.path} is still being written by ranks of an earlier start, among {who}; end those first."
                        raise RunError(line) from busy
                time.sleep(RANKS_POLL_S)


def parent_of(config: Config) -> str:
    """Absolute folder of the run that train.init_from names, by a path or as a run in run.dir; empty: none."""
    given = config.train.init_from
    if not given:
        return ""
    path = Path(given).expanduser()
    is_name = "/" not in given and not RunFolder(path).config_file.is_file()
    return str((Path(config.run.dir).expanduser() / given if is_name else path).resolve())


def find_parent(child: RunFolder, parent: Path) -> RunFolder | None:
    """The run that `child` started from: where it was then or, where both were moved together, beside it; None: gone."""
    places = (parent, child.path.absolute().parent / parent.name)
    return next((folder for folder in map(RunFolder, places) if folder.config_file.is_file()), None)


def check_forks(parent: RunFolder) -> None:
    """Raise RunError where there is no run that `run.fork=true` could start from."""
    if not parent.config_file.is_file():
        raise RunError(f"run.fork=true: {parent.path} holds no run to start from; check run.name and run.dir.")


def check_continues(old: Config, new: Config, folder: Path) -> None:
    """Refuse to continue a run with settings that make it a different run.

    Raises RunError that names the keys. May differ: length, logging, workers, ZeRO stage.
    """
    before, after = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
    differ = [
        f"{key}={_as_typed(after.get(key))} (was {_as_typed(before.get(key))})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and (key in MUST_STAY or not key.startswith(MAY_CHANGE))
    ]
    if differ:
        raise RunError(
            f"{folder} holds a run with other settings: {'; '.join(differ)}; go on with its own by `distcond train --config "
            f"{shlex.quote(str(folder / 'config.yaml'))}`, use another run.name, or run.fork=true to start a new run from its "
            "newest checkpoint."
        )


def check_same_data(folder: RunFolder, found: Mapping[str, Any]) -> None:
    """Refuse to continue a run on other examples: those that it is validated on may be among those that it was trained on.

    found: the task's fingerprint. Versions in it may change. Raises RunError.
    """
    if not folder.is_begun() or not folder.environment_file.exists():
        return
    with contextlib.suppress(ValueError, TypeError, KeyError):  # damaged: nobody knows
        before = json.loads(folder.environment_file.read_text())["data"]
        if _without_versions(before) != _without_versions(json.loads(json.dumps(found))):
            raise RunError(
                f"{folder.path} was trained on other data than data={found.get('name')} is now; restore its files, use another "
                "run.name, or run.fork=true to start a new run from its checkpoint."
            )


def _without_versions(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_versions(part) for key, part in value.items() if key not in {"python", "numpy"}}


def _as_typed(value: Any) -> str:
    return str(value.value) if isinstance(value, Enum) else repr(value)


def is_there(file: Path) -> bool:
    """Whether a file exists. NOTE: unlike `Path.exists` it raises nothing where storage is stale, cut off or closed to us."""
    return os.path.exists(file)  # noqa: PTH110


def write_json(file: Path, value: Any) -> None:
    """Write JSON in one move: readers see the old file or the new one. Numbers that JSON does not know become null."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path, advice: str) -> None:
    """Refuse a folder in which, or under which, no file can be made: before hours go into what it is to hold. Raises RunError."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"{there} is no folder; {advice}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{there} cannot be written to; {advice}")


def check_can_hold(flag: str, file: Path, name: str) -> None:
    """Refuse a place where no file can be written, before anything is computed for it. Raises RunError.

    flag: what gave it. name: of a file, for advice.
    """
    if not file.absolute().parent.is_dir():
        raise RunError(f"{flag} {file}: {file.parent} is not a folder; create it first.")
    if file.is_dir():
        raise RunError(f"{flag} {file} is a folder; give a file in it, e.g. {file / name}.")
    check_writable(file.parent, f"choose another place by {flag} FILE.")


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values of mappings inside of each other by dotted key; an empty mapping has none."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {key: leaf for name, part in value.items() for key, leaf in flat(part, f"{prefix}.{name}".lstrip(".")).items()}
