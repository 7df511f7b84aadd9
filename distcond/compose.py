"""Configurations in and out: composed from conf/ and the command line, saved, loaded and changed by dotted key.

The only module that knows Hydra and OmegaConf. Whatever a user got wrong leaves here as one line of `ConfigError`.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

import hydra
import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distcond.config import Config
from distcond.config.check import need
from distcond.config.files import check_references, check_values, leaves, open_checked
from distcond.errors import ConfigError
from distcond.resources import resource_dir

VERSION_BASE = "1.3"
_NEEDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_NEEDS |= {dict: "a mapping, e.g. {a: 1}", NoneType: "null"}


def compose(overrides: Sequence[str], config_dir: str | None = None) -> Config:
    """The configuration of a run: conf/, then the user's files in config_dir, then overrides in Hydra's grammar."""
    for override in overrides:
        if re.match(r"[+~]*hydra[./=@]", override):
            raise ConfigError(
                f"{override}: Hydra's own settings have no effect on a run; see run.dir, run.name and --config-dir."
            )
    node = compose_node(overrides, config_dir)
    with _user_errors():
        config = _to_config(node)
    config.sweep.space = _dotted(config.sweep.space)
    return config


def load_config(file: Path) -> Config:
    """The configuration in a resolved file, e.g. the config.yaml of a run folder."""
    with _user_errors(str(file)):
        loaded = OmegaConf.load(open_checked(file))
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{file} is not a configuration; needed is a mapping such as the config.yaml of a run.")
        return _to_config(_typed(loaded))


def save_config(config: Config, file: Path) -> None:
    """Write what `load_config` reads back as an equal configuration."""
    file.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    """The text of a resolved configuration file."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain containers of str, int, float, bool and None, to ship between processes."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration of plain containers; what is left out has its default."""
    with _user_errors():
        return _to_config(_typed(OmegaConf.create(dict(values))))


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of `config` with the values of some dotted keys replaced: typed, and validated once all are in place."""
    node = _open(OmegaConf.structured(config))
    with _user_errors():
        for key, value in changes.items():
            OmegaConf.update(node, key, value, merge=False)
        return _to_config(node)


def hydra_main(argv: Sequence[str]) -> int:
    """Let Hydra itself answer its flags --cfg, --info, --help, --hydra-help or --shell-completion; its exit status.

    NOTE: without one of these flags Hydra would start a job and make an outputs/ folder.
    """
    _schema()
    answer = hydra.main(str(resource_dir("conf")), "config", VERSION_BASE)(_no_job)
    before = sys.argv
    sys.argv = ["distcond", *argv]  # where Hydra reads its flags, and completion the name of the command
    try:
        answer()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0


def compose_node(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """What Hydra composes, with every key and type checked, but values not yet resolved nor tested for sense."""
    _schema()
    search = [_search_in(config_dir)] if config_dir else []
    with _user_errors(), hydra.initialize_config_dir(str(resource_dir("conf")), version_base=VERSION_BASE):
        for given in overrides:
            check_references(given, given)  # a file of a group may be named by one, which Hydra fills in at once
        try:
            node = hydra.compose("config", [*search, *overrides])
        except (TypeError, AttributeError, AssertionError) as error:  # so Hydra fails, e.g. at data=[null]
            raise ConfigError(
                f"{' '.join(overrides)}: these groups, or a file's defaults, cannot be composed ({error})."
            ) from error
        # NOTE: typed anew, because Hydra lets `+model.tree.dpth=3` add a key that the dataclass does not have.
        return _typed(node)


def draft(overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """What `compose` would give, as plain containers: references are filled in, but values not tested for sense."""
    node = compose_node(overrides, config_dir)
    with _user_errors():
        return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True, enum_to_str=True))


def nearest(given: str, real: Iterable[str]) -> str:
    """A question naming what was probably meant, or nothing: '; did you mean model.tree.depth?'."""
    names = list(real)
    last = given.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in names}
    found = (
        [name for name in names if name.endswith(f".{given}")]
        or get_close_matches(given, [name for name in names if name.endswith(f".{last}")], n=2, cutoff=0.5)
        or get_close_matches(given, [name for name in names if name.count(".") == given.count(".")], n=1)
        or [by_last[name] for name in get_close_matches(last, by_last, n=1)]
    )
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def _no_job(config: DictConfig) -> None:
    raise AssertionError("Hydra was asked to start a job; distcond starts its own")


def _open(node: DictConfig) -> DictConfig:
    """Allow any key below the fields that are free mappings, where Hydra would ask for a `+`."""
    for key, kind in _types().items():
        if get_origin(kind) is dict:
            OmegaConf.set_struct(OmegaConf.select(node, key), False)
    return node


@cache
def _schema() -> DictConfig:
    """The types and defaults of every key; Hydra knows it as `schema`, the first entry of conf/config.yaml."""
    schema = _open(OmegaConf.structured(Config))
    ConfigStore.instance().store(name="schema", node=schema)
    Plugins.instance().register(_OwnFiles)
    return schema


def _typed(node: DictConfig) -> DictConfig:
    values = OmegaConf.to_container(node, enum_to_str=True)
    check_values(values)
    return cast(DictConfig, OmegaConf.merge(_schema(), values))


def _to_config(node: DictConfig) -> Config:
    """Fill in references; the dataclasses then judge the values."""
    values = OmegaConf.to_container(node, enum_to_str=True)
    check_values(values)
    if any("${" in value for _, value in leaves(values) if isinstance(value, str)):
        node = _filled_in(node)
    for key, kind in _types().items():
        entries = OmegaConf.select(node, key) if get_origin(kind) is list else []
        if any(OmegaConf.is_config(entry) for entry in entries):  # NOTE: OmegaConf lets a list[str] hold lists
            raise ConfigError(f"{key}={entries}: needed is {_needs(kind)}.")
    return cast(Config, OmegaConf.to_object(node))


def _filled_in(node: DictConfig) -> DictConfig:
    """The node without references. NOTE: typed anew, because OmegaConf fills any value into any key."""
    values = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    for key, value in leaves(values):  # written to a file and read again, it would be filled in then
        need("${" not in str(value), f"{key}={value}: ${{ is for references alone; use another name.")
    typed = _typed(cast(DictConfig, OmegaConf.create(values)))
    check_values(OmegaConf.to_container(typed, enum_to_str=True))
    return typed


def _dotted(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A sweep's space by dotted keys, however it was nested: `sweep.space.model.tree.depth=[2,4]` nests."""
    flat: dict[str, Any] = {}
    for key, values in space.items():
        is_section = isinstance(values, Mapping) and not {"min", "choice"} & values.keys()
        flat |= _dotted(values, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": values}
    return flat


def _own_files(directory: str) -> Path:
    """Absolute path of the user's folder of configuration files."""
    own, shipped = Path(directory).expanduser().resolve(), resource_dir("conf").resolve()
    if not own.is_dir():
        raise ConfigError(f"--config-dir {directory}: no such folder.")
    for file in sorted(shipped.glob("*/*.yaml")):
        clash = own / file.relative_to(shipped)
        if clash.exists() and clash != file:  # Hydra would silently take the shipped one
            raise ConfigError(f"{clash} has the name of a file that ships with distcond; give it a name of its own.")
    return own


def _search_in(config_dir: str) -> str:
    """The override that makes Hydra look into the user's folder, too."""
    return f"hydra.searchpath=[{_quote(f'{_OwnFiles.scheme()}://{_own_files(config_dir)}')}]"


class _OwnFiles(FileConfigSource):  # type: ignore[misc]  # Hydra is untyped
    """How Hydra reads the user's files: only after each has been looked through."""

    @staticmethod
    def scheme() -> str:
        return "own"

    def load_config(self, config_path: str) -> ConfigResult:
        open_checked(Path(self.path) / self._normalize_file_name(config_path))
        return super().load_config(config_path)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


@contextmanager
def _user_errors(file: str = "") -> Iterator[None]:
    """Turn what Hydra, OmegaConf, the YAML reader or the file system refuse into one line."""
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        line = _explain(error)
        raise ConfigError(line if file in line else f"{file}: {line}") from error


def _explain(error: Exception) -> str:
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error.override)
    if isinstance(error, MissingConfigException):
        return _explain_option(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}."
    if isinstance(error, RecursionError):
        return "mappings, lists or references are inside of each other without end."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror.lower()}."
    return _explain_value(f"{error}\n{error.__cause__ or ''}")


def _explain_grammar(given: str) -> str:
    """The override does not follow Hydra's grammar."""
    key, equals, value = given.partition("=")
    if not equals:
        return f"{given!r} is not an override; write key=value, e.g. train.max_steps=100."
    if value[:1] in ("[", "{"):
        return f"{given!r} cannot be parsed; close every bracket and quote special text: \"data.files=['~/a b.txt']\"."
    return f'{given!r} cannot be parsed; quote special text, for the shell too: "{key}={_quote(value)}".'


def _explain_option(error: MissingConfigException) -> str:
    """A group has no such file."""
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return f"there is no {option}.yaml."
    options = error.options or []
    hint = nearest(option, options) or "."
    return f"{group}={option}: there is no {group}/{option}.yaml; {group} has {', '.join(options) or 'none'}{hint}"


def _explain_value(said: str) -> str:
    """A key or value is refused; file, override, key and value are taken out of what Hydra and OmegaConf said."""
    file = _search(r"^In '(.+?)': ", said)
    where = f"{file}.yaml: " if file and file != "config" else ""
    text = re.sub(r"^In '.+?': (\w+ raised while composing config:\n)?", "", said)
    key = re.sub(r"\[\d+\]$", "", _search(r"^ *full_key: (.+)$", text))
    unknown = _search(r"^Could not (?:override|delete from config\.) '(.+?)'", text)
    if unknown or re.search(r"^Key '.*' (is )?not in ", text, re.MULTILINE):
        if key == "experiment":
            return f"{where}the first line of an experiment is '# @package _global_'."
        return f"{where}{_unknown(key if not unknown or unknown in _types() else unknown)}"
    if "--multirun" in text:
        given = _search(r"'(.+?=.+)'", text)
        return f"{given}: needed is one value; a list is written [1,2], and a search over values is `distcond sweep`."
    if key in _types() and "interpolation" not in text.lower() and "deletion" not in text:
        given = _search(r"^Error merging override (.+)$", text) or _given(key, text)
        return f"{where}{given}: needed is {_needs(_types()[key])}."
    lines = [line.strip() for line in text.splitlines() if not re.match(r" +\w+(: |=)", line)]
    return where + "; ".join([*([key] if key else []), *filter(None, lines)])


def _given(key: str, text: str) -> str:
    value = _search(r"[Vv]alue '(.*?)'", text) or _search(r"value: (.*)$", text)
    return f"{key}={value}" if value else key


def _unknown(key: str) -> str:
    groups = [path.name for path in resource_dir("conf").iterdir() if path.is_dir()]
    hint = nearest(key, [*_types(), *groups])
    return f"there is no key {key}{hint or '; `distcond train --cfg job` shows them all.'}"


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1) if found else ""


@cache
def _types(section: type = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type, of every key below a section; sections are keys too."""
    types: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        types[prefix + name] = kind
        if is_dataclass(kind):
            types |= _types(cast(type, kind), f"{prefix}{name}.")
    return types


def _needs(kind: Any) -> str:
    """What a field of this type accepts, in words."""
    if isinstance(kind, UnionType):
        return " or ".join(_needs(choice) for choice in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return f"one of {', '.join(kind)}"
    if is_dataclass(kind):
        return f"a value for one of its keys: {', '.join(field.name for field in fields(kind))}"
    if get_origin(kind) is list:
        return f"a list [...], each entry {_needs(get_args(kind)[0])}"
    return _NEEDS[get_origin(kind) or kind]
