"""What a configuration may hold, judged before anything in it is built or looked up: files come from strangers, too."""

import io
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distcond.config.check import need
from distcond.redaction import has_password, is_secret

MAX_BYTES = 2**20
MAX_VALUES = 100_000
"Of a file, once its aliases are written out: ten lines of YAML can stand for 10**9 values."
MAX_DEPTH = 50
"Of mappings and lists inside of each other; a run has 3."
PATHS = ("run.dir", "run.name", "sweep.name", "data.cache_dir", "train.init_from")
"Keys whose texts are names of folders."
EXPANDED = ("run.dir", "data.cache_dir", "data.tokenizer", "train.init_from")
"Keys whose texts may begin with ~ or ~user."
MAX_NAME, MAX_PATH = 200, 3000
"Bytes; file systems have 255 and 4096, and some are added."
FUNCTIONS = ("now", "oc.select")
"What `${name:...}` may call: the time, and another key with a default. No environment, no files, no code."


class Text(io.StringIO):
    """The text of a file, which knows its name: what YAML says of a mistake begins with it."""

    name = ""


def open_checked(file: Path) -> Text:
    """A YAML file that a configuration can be built from. Raises ConfigError, OSError, ValueError, YAMLError."""
    with file.open("rb") as source:
        data = source.read(MAX_BYTES + 1)
    need(len(data) <= MAX_BYTES, f"{file} has more than {MAX_BYTES:,} bytes, which no configuration has.")
    stream = Text(data.decode("utf-8"))
    stream.name = str(file)
    _check_yaml(stream)
    stream.seek(0)
    return stream


def check_values(values: Any) -> None:
    """Refuse, in plain containers, what `check_references` refuses, secrets, and numbers of no run: inf, nan, 2**63.

    Raises ConfigError naming the key.
    """
    for key, value in leaves(values):
        if isinstance(value, str):
            check_references(value, f"{key}={value}")
            need(
                not has_password(value) and not (value and is_secret(key.rpartition(".")[2])),
                f"{key} holds a password, key or token, which config.yaml, wandb and a cluster's jobs would show; "
                "give it by an environment variable or ~/.netrc.",
            )
            need(_is_text(value), f"{key}={value[:MAX_NAME]!r} is no text: it holds a NUL, or half of a character.")
            need(key not in PATHS or _is_path(value), f"{key}={value[:MAX_NAME]!r} is too long for a folder, or no plain text.")
            need(key not in EXPANDED or _has_home(value), f"{key}={value}: nobody here has such a home; write the whole path.")
        elif isinstance(value, float):
            need(math.isfinite(value), f"{key}={value}: needed is a finite number.")
        elif isinstance(value, int):
            need(abs(value) < 2**63, f"{key} is a number of {value.bit_length()} bits; needed is one below 2**63.")


def _is_text(text: str) -> bool:
    """Whether files can be named so: any system call refuses a NUL, and what is no character and no byte of a name."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _is_path(text: str) -> bool:
    data = text.encode("utf-8", "replace")
    return text.isprintable() and len(data) <= MAX_PATH and max(map(len, data.split(b"/"))) <= MAX_NAME


def _has_home(text: str) -> bool:
    return not text.startswith("~") or os.path.expanduser(text) != text  # noqa: PTH111 - which raises where there is none


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of whatever is not a container in plain containers."""
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(value, f"{prefix}.{key}".lstrip("."))
    else:
        yield prefix, values


def check_references(text: str, where: str) -> None:
    """Refuse ${name:...} unless the name is one of FUNCTIONS. NOTE: also a name made of references, and one in quotes."""
    for name, end in re.findall(r"\$\{([^:}$]*)([:$])", text):
        need(
            end == ":" and name.strip() in FUNCTIONS,
            f"{where}: ${{{name}{end}...}} is not filled in, only keys are, e.g. ${{seed}}, and the functions "
            f"{', '.join(FUNCTIONS)}; write the value itself, or let the shell fill it in.",
        )


def _check_yaml(stream: Text) -> None:
    """Count values without building any, aliases as often as they would be built, and look for references in texts."""
    where = stream.name
    sizes: dict[str, int] = {}
    containers: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(stream, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            need(event.anchor not in (anchor for anchor, _ in containers), f"{where}: *{event.anchor} is a part of itself.")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            check_references(event.value, where)
            count += 1
        elif isinstance(event, yaml.CollectionStartEvent):
            containers.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = containers.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        need(len(containers) <= MAX_DEPTH, f"{where}: more than {MAX_DEPTH} mappings or lists are inside of each other.")
        need(count <= MAX_VALUES, f"{where} stands for more than {MAX_VALUES:,} values, which no configuration has.")
