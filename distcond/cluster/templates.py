"""Templates of `launch/`: values are quoted by filters, a name that is missing is an error."""

import json
import math
import re
import shlex
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distcond.config import ClusterConfig
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


def cores_of_a_node(cluster: ClusterConfig) -> tuple[int, int]:
    """Cores of a node that one rank has to itself, as Ray is told, and as are asked for: one beside it, for data and Ray.

    NOTE: told of that core too, Ray would put two ranks of one core on one node, with the memory of one.
    Raises ConfigError where two ranks fit into one core.
    """
    cpus = cluster.cpus_per_worker
    if cpus <= 0.5:
        raise ConfigError(f"cluster.cpus_per_worker={cpus:g}: two ranks would share a node; use more than 0.5, e.g. 1.")
    return math.ceil(cpus), math.ceil(cpus) + 1
