"""Templates of `launch/`: values are quoted by filters, a name that is missing is an error."""

import json
import re
import shlex
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distcond.errors import ConfigError
from distcond.resources import resource_dir

TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2}):(\d{2})")


def render_template(template: str, /, **values: Any) -> str:
    """A file of `launch/` with its values; filters: `shell` and `json` (which is YAML, too) quote."""
    environment = Environment(
        loader=FileSystemLoader(resource_dir("launch")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["shell"] = lambda value: shlex.quote(str(value))
    environment.filters["json"] = lambda value: json.dumps(str(value))
    return environment.get_template(template).render(**values)


def seconds(time_limit: str) -> int:
    """A time limit of `cluster.time_limit` in seconds. Raises ConfigError for another form."""
    found = TIME_LIMIT.fullmatch(time_limit)
    if found is None:
        raise ConfigError(f"cluster.time_limit={time_limit!r} is not a time; use HH:MM:SS or D-HH:MM:SS.")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
