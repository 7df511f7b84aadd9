"""One cluster of two hosts for all tests here: a head and a node of one core each, and a laptop that is no part of it."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.processes import SLOW_START, wait_until
from tests.hosts.hosts import Host, Switch, missing

TOKEN = "0123456789abcdef" * 4
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    **SLOW_START,
    # A node that does not answer for 10 s is given up (Ray: after a minute).
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


class Cluster:
    """A Ray of two hosts, the second of which may end and be replaced."""

    def __init__(self, folder: Path, at_end: contextlib.ExitStack) -> None:
        self.shared, self.own = folder / "shared", folder / "own"
        self._logs, self._at_end = folder / "logs", at_end
        for part in (self.shared, self.own, self._logs):
            part.mkdir()
        self.switch = Switch()
        at_end.callback(self.switch.end)
        self.head, self.laptop = self.add_host(1), self.add_host(9)
        self.dashboard = f"http://{self.head.address}:8265"
        self._start_ray(self.head, "--head", "--port=6379", f"--dashboard-host={self.head.address}")
        self.node = self.add_node(2)

    def add_host(self, number: int) -> Host:
        """A host that does nothing yet."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        host = Host(self.switch, number, self.own, kept | ENVIRONMENT)
        self._at_end.callback(host.end)
        return host

    def add_node(self, number: int) -> Host:
        """A host that is a node of the cluster; it may have the number of one that has ended."""
        host = self.add_host(number)
        self._start_ray(host, f"--address={self.head.address}:6379")
        return host

    def _start_ray(self, host: Host, *words: str) -> None:
        command = ["ray", "start", "--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        log = self._logs / f"{host.name}.log"
        with log.open("wb") as output:
            ray = host.start(*command, f"--node-ip-address={host.address}", *words, output=output)
        self._at_end.callback(lambda: (host.end(), ray.wait()))

        def is_up() -> bool:
            assert ray.poll() is None, log.read_text()
            return "Ray runtime started." in log.read_text()

        wait_until(is_up)


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    why = missing()
    if why:
        pytest.skip(why)
    # NOTE: not pytest's folder, for the paths of Ray's sockets may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dc-"))
    try:
        with contextlib.ExitStack() as at_end:
            yield Cluster(folder, at_end)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The same, whole again after a test that failed."""
    yield session_cluster
    if not session_cluster.node.is_up:
        session_cluster.node = session_cluster.add_node(2)
