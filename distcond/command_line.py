"""A configuration as the line that a person would type for it."""

import functools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distcond.compose import compose, draft, load_config, override, to_dict
from distcond.config import Config, RunConfig
from distcond.config.readers import check_read
from distcond.errors import ConfigError, RunError
from distcond.train.run_folder import RunFolder, check_forks


def typed(words: Sequence[str], config_dir: str | None = None, *, may_fork: bool = False) -> Config:
    """The configuration that a person's words ask for; may_fork: run.fork=true starts from the settings of that run.

    Raises ConfigError, also for a key that nothing reads, and RunError where there is no run to fork.
    """
    config = compose([*(_of_parent(words, config_dir) if may_fork else []), *words], config_dir)
    check_read(config, {_key(word) for word in words})
    return config


def _of_parent(words: Sequence[str], config_dir: str | None) -> list[str]:
    """The settings of the run that is forked, as words: all that were not typed, nor chosen by a file that was."""
    if not config_dir and not any("fork" in word for word in words):  # to look takes 0.2 s; no file that ships forks
        return []
    wanted = draft(words, config_dir)
    run, new, default = RunConfig(**wanted["run"]), _flat(wanted), _default()
    if not run.fork:
        return []
    parent = RunFolder(Path(run.dir).expanduser() / run.name)
    check_forks(parent)
    try:
        old = overrides_of(load_config(parent.config_file))
    except ConfigError as error:
        raise RunError(f"run.fork=true goes on with the settings of {parent.path}, which are unreadable: {error}") from error
    keys = {_key(word) for word in words}
    # What a typed experiment chooses, e.g. other data, has a section to itself, as what is typed has.
    chosen = {section for section in ("model", "data") if new[f"{section}.name"] != default[f"{section}.name"]}
    taken = {*keys, "run", "sweep", *(section for section in chosen if f"{section}.name" not in keys)}
    return [word for word in old if not _is_below(_key(word), taken) and new.get(_key(word)) == default.get(_key(word))]


def _key(word: str) -> str:
    """The dotted key, or the group, that an override is for."""
    return re.split("[=@]", word.lstrip("+~"), maxsplit=1)[0]


def _is_below(key: str, sections: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


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
