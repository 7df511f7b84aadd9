from collections.abc import Iterator

import pytest

from distcond.cluster.local import ray_session
from distcond.cluster.policy import Room
from distcond.config import ClusterConfig


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """One local Ray for all tests that need one but do not test its start; it has room for two workers on two cores."""
    with ray_session(ClusterConfig(cpus_per_worker=0.1), tmp_path_factory.mktemp("ray")) as room:
        yield room
