import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import ray

from distcond.cluster import jobs
from distcond.errors import ClusterError

LOG = "first\nlast\n"


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
    started = time.monotonic()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # but does not listen
        with pytest.raises(ClusterError, match=r"No Ray cluster answers at http://127.0.0.1:\d+ .*refused"):
            jobs.connect(f"http://127.0.0.1:{unused.getsockname()[1]}")
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
    with _serving(_NotFound) as address, pytest.raises(ClusterError, match="does not answer like a Ray dashboard"):
        jobs.connect(address)


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # Ray's client
@pytest.mark.parametrize(("silent", "patience_s", "arrived"), [(2, 30.0, True), (1000, 0.5, False)])
def test_the_last_lines_are_asked_for_until_they_arrive_or_the_cluster_stays_silent(
    silent: int, patience_s: float, arrived: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "restored afterwards")
    monkeypatch.setattr(jobs, "POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr(jobs, "PATIENCE_S", patience_s)
    monkeypatch.setattr(_Ended, "silent", silent)
    written: list[str] = []
    with _serving(_Ended) as address:
        status = jobs.follow(jobs.connect(address), "job", written.append)
    assert status == "SUCCEEDED"
    assert "".join(written) == (LOG if arrived else "")
    assert ("The last lines of the log did not arrive" in capfd.readouterr().err) != arrived


@contextlib.contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


class _Ended(_NotFound):
    """A dashboard whose one job has ended, and which closes the first `silent` connections that ask for its log."""

    silent = 0
    answers: ClassVar[dict[str, object]] = {
        "/api/version": {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""},
        "/api/jobs/": [],
        "/api/jobs/job": {"type": "SUBMISSION", "entrypoint": "true", "status": "SUCCEEDED"},
        "/api/jobs/job/logs": {"logs": LOG},
    }

    def do_GET(self) -> None:
        if self.path.endswith("/logs") and type(self).silent > 0:
            type(self).silent -= 1
            return
        if self.path not in self.answers:
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.answers[self.path]).encode())
