import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from distcond.cluster import jobs
from distcond.errors import ClusterError


@pytest.mark.parametrize(
    ("address", "environment", "found"),
    [
        ("http://head:8265", {}, "http://head:8265"),
        ("https://head/ray/", {"RAY_ADDRESS": "http://other:1"}, "https://head/ray"),
        ("", {"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
        ("", {"RAY_ADDRESS": "head:6379", "RAY_API_SERVER_ADDRESS": "http://head:8265"}, "http://head:8265"),
    ],
)
def test_the_address_is_the_configurations_then_the_environments(address: str, environment: dict[str, str], found: str) -> None:
    assert jobs.find_address(address, environment) == found


@pytest.mark.parametrize(
    ("address", "environment", "message"),
    [
        ("", {}, "cluster.address is empty and RAY_ADDRESS is not set"),
        ("head:8265", {}, "cluster.address=head:8265 is not the address of a Ray dashboard"),
        ("ray://head:10001", {}, "cluster.address=ray://head:10001 is not"),
        ("", {"RAY_ADDRESS": "10.0.0.1:6379"}, "RAY_ADDRESS=10.0.0.1:6379 is not"),
    ],
)
def test_an_address_that_is_no_dashboard_is_refused(address: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        jobs.find_address(address, environment)


def test_an_address_where_nobody_answers_is_refused_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"No Ray cluster answers at http://127.0.0.1:\d+ .*refused"):
        jobs.connect(f"http://127.0.0.1:{port}")
    assert time.monotonic() - started < 10


@pytest.mark.thorough
def test_an_address_that_accepts_and_says_nothing_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CONNECT_TIMEOUT_S", 0.5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(ClusterError, match="No Ray cluster answers"):
            jobs.connect(f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.thorough
def test_a_server_that_is_not_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "restored afterwards")
    with HTTPServer(("127.0.0.1", 0), _NotFound) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ClusterError, match="does not answer like a Ray dashboard"):
                jobs.connect(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


class _NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass
