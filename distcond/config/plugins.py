"""Tasks and models that other installed packages bring, by entry points of the groups `distcond.tasks` and `distcond.models`.

Only a name that does not ship with distcond is looked up, and only `call` imports the package that has it.
"""

import traceback
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from distcond.config.check import need
from distcond.errors import ConfigError, UserError

GROUPS = {"data": "distcond.tasks", "model": "distcond.models"}
"Section of the configuration whose `name` may be an entry point's -> the group of these."


def check_name(section: str, name: str, shipped: Collection[str], options: Mapping[str, Any]) -> None:
    """Refuse a name that neither ships with distcond nor is installed once, and options of one that ships. Imports nothing."""
    if name in shipped:
        need(
            not options,
            f"{section}.options={dict(options)} is read by entry points alone; {section}.name={name} has keys of its own, see "
            f"`distcond train --cfg job --package {section}`.",
        )
        return
    found, names = _installed(section), sorted({entry.name for entry in _installed(section)})
    meant = get_close_matches(name, [*shipped, *names], n=1)
    need(
        name in names,
        f"{section}.name={name}: needed is one of {', '.join(shipped)}, or an entry point of {GROUPS[section]}, of which "
        f"{', '.join(names) or 'none'} is installed{f'; did you mean {meant[0]}?' if meant else '.'}",
    )
    packages = [entry.dist.name if entry.dist else entry.value for entry in found if entry.name == name]
    need(len(packages) == 1, f"{section}.name={name} is in the packages {' and '.join(packages)}; remove all but one of them.")


def call(section: str, name: str, *given: Any) -> Any:
    """What the entry point makes of its arguments. Raises its UserErrors, and for any other of its errors ConfigError."""
    entry = next((entry for entry in _installed(section) if entry.name == name), None)
    if entry is None:  # in a process on another machine than the one that read the configuration
        raise ConfigError(f"{section}.name={name} is not installed here ({GROUPS[section]}); install its package on every node.")
    try:
        return entry.load()(*given)
    except UserError:
        raise
    except Exception as error:
        raise refusal(section, name, f"failed with {type(error).__name__}: {error}{_place(error)}") from error


def refusal(section: str, name: str, why: str) -> ConfigError:
    """What is wrong with an entry point, as an error that names it."""
    value = next((entry.value for entry in _installed(section) if entry.name == name), "")
    return ConfigError(f"{section}.name={name}: {value}, an entry point of {GROUPS[section]}, {why}.")


def _place(error: Exception) -> str:
    """The line of the package's code that an error is from, where there is one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in frame.filename]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


@cache
def _installed(section: str) -> tuple[EntryPoint, ...]:
    """Those of all installed packages; 20 ms for a hundred of them."""
    return tuple(entry_points(group=GROUPS[section]))
