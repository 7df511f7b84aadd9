import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distcond.cluster.local import ray_session
from distcond.cluster.policy import Room
from distcond.cluster.trainer import fit, prepare_run
from distcond.config import ClusterConfig
from tests.cluster.processes import SLOW_START, end_commands, faulty_config

os.environ.update(SLOW_START)  # before Ray is imported


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever becomes of a test, the commands that it has begun do not run beside the next one."""
    yield
    end_commands()


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """One local Ray for all tests that need one but do not test its start; it has room for two workers on two cores."""
    with ray_session(ClusterConfig(cpus_per_worker=0.1), tmp_path_factory.mktemp("ray")) as room:
        yield room


@pytest.fixture(scope="session")
def undisturbed(shared_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two workers to which nothing happens; not to be changed."""
    config = faulty_config(tmp_path_factory.mktemp("undisturbed"))
    path = prepare_run(config)
    fit(config)
    return path
