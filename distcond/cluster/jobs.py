"""One job on a running Ray cluster, through its Jobs API: connect, send, follow, and say how it ended."""

import asyncio
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from distcond.errors import ClusterError

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
CONNECT_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 1.0
PATIENCE_S = 60.0
"A job is followed through this much silence of the cluster's."

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)
for _chatter in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_chatter).setLevel(logging.WARNING)  # they set themselves to INFO


@dataclass(frozen=True, slots=True)
class Job:
    """What is sent: the same whether it is shown (`--dry-run`) or submitted."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `JobSubmissionClient.submit_job`."""
        return asdict(self)


def find_address(address: str, environment: Mapping[str, str]) -> str:
    """The dashboard to talk to: `address` (cluster.address), else the environment's. Raises ClusterError."""
    name = "cluster.address"
    if not address:
        name = next((variable for variable in ADDRESS_VARIABLES if environment.get(variable)), "")
        if not name:
            raise ClusterError(
                "cluster.address is empty and RAY_ADDRESS is not set; name the cluster's dashboard, e.g. cluster.address=http://head:8265."
            )
        address = environment[name]
    if not address.startswith(("http://", "https://")):
        raise ClusterError(f"{name}={address} is not the address of a Ray dashboard; use http://HOST:PORT, usually port 8265.")
    return address.rstrip("/")


def connect(address: str) -> JobSubmissionClient:
    """A client whose cluster answers and accepts our token.

    Raises ClusterError, within `CONNECT_TIMEOUT_S` where nobody is there.
    """
    _probe(address)
    # NOTE: the client lets these variables win over its argument, and talks without a time limit of its own.
    os.environ[ADDRESS_VARIABLES[0]] = address
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except AuthenticationError as error:
        raise ClusterError(_token_advice(address, str(error))) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"{address} does not answer like a Ray dashboard: {_first_line(error)}") from error
    return client


def _probe(address: str) -> None:
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        error.close()  # somebody is there; whether it is Ray, and whether it knows us, the client finds out
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ClusterError(
            f"No Ray cluster answers at {address} ({reason}); check cluster.address, and that port forwarding is up."
        ) from error


def _token_advice(address: str, answer: str) -> str:
    if answer.startswith("Authentication required"):
        return f"{address} asks for a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
    return (
        f"{address} refuses this token; RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH, "
        "must hold the one that the cluster was started with."
    )


def send(client: JobSubmissionClient, job: Job, package: Path) -> str:
    """Upload the package and submit the job; returns its id. Raises ClusterError."""
    arguments = job.to_dict()
    arguments["runtime_env"]["working_dir"] = str(package)
    try:
        identifier: str = client.submit_job(**arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"The cluster did not take the job: {_first_line(error)}") from error
    return identifier


def follow(client: JobSubmissionClient, identifier: str, write: Callable[[str], object]) -> JobStatus:
    """Pass on what the job writes until it has ended; returns how it ended.

    NOTE: whether the job lives is asked, never inferred from its log: a log connection may end early or never.
    Raises ClusterError once the cluster has been silent for `PATIENCE_S`.
    """
    follower = _LogFollower(client, identifier, write)
    follower.start()
    status = _wait(client, identifier)
    follower.finish()
    return status


def _wait(client: JobSubmissionClient, identifier: str) -> JobStatus:
    while not (status := _ask(client.get_job_status, identifier)).is_terminal():
        time.sleep(POLL_INTERVAL_S)
    return status


def _ask(question: Callable[[str], Answer], identifier: str) -> Answer:
    """The cluster's answer, asked for again while it is silent. Raises ClusterError after `PATIENCE_S`."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return question(identifier)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > end:
                raise ClusterError(f"The cluster has not answered for {PATIENCE_S:.0f} s: {_first_line(error)}") from error
        time.sleep(POLL_INTERVAL_S)


class _LogFollower(threading.Thread):
    """Writes a job's log as it grows, each character once, across lost connections."""

    def __init__(self, client: JobSubmissionClient, identifier: str, write: Callable[[str], object]) -> None:
        super().__init__(name=f"log of {identifier}", daemon=True)
        self._client = client
        self._identifier = identifier
        self._write = write
        self._num_written = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def run(self) -> None:
        """Follow until the job has ended, connecting again where the connection is lost."""
        while not self._ended.is_set():
            try:
                asyncio.run(self._follow())
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                log.debug("Lost the log of %s: %s", self._identifier, error)
            self._ended.wait(POLL_INTERVAL_S)

    async def _follow(self) -> None:
        start = 0
        async for text in self._client.tail_job_logs(self._identifier):
            self._pass_on(start, text)
            start += len(text)

    def _pass_on(self, start: int, text: str) -> None:
        """Write what of `text`, which stands at `start` in the log, has not been written yet."""
        with self._lock:
            unwritten = text[max(0, self._num_written - start) :]
            self._write(unwritten)
            self._num_written += len(unwritten)

    def finish(self) -> None:
        """Write what is left once the job has ended. NOTE: the connection itself closes seconds later; not waited for."""
        self._ended.set()
        try:
            self._pass_on(0, _ask(self._client.get_job_logs, self._identifier))
        except ClusterError as error:
            log.warning("The last lines of the log did not arrive. %s", error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
