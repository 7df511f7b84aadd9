"""The Ray that a run uses: started on this machine for the run alone, or a running cluster that is connected to."""

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from distcond.cluster.host import LOOPBACK
from distcond.cluster.policy import Room, ask_of, check_room
from distcond.cluster.reaper import reaped
from distcond.config import ClusterConfig
from distcond.errors import ClusterError, UserError

OBJECT_STORE_BYTES = 256 * 2**20
"Shared memory for batches in flight; a few MiB would do, and what does not fit goes to disk."
STOP_TIMEOUT_S = 3.0
"How long processes may take to end before they are killed."
CONNECT_TIMEOUT_S = 3.0
PREFIX, LOCK = "distcond-ray-", "lock"
"Of the names of folders for Ray's files, and of the file in each that a living run holds."
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray: 15, as if training could wait for whatever else runs here
}
"Environment of Ray's processes, where the user has not set it."


def preflight(cluster: ClusterConfig) -> None:
    """Refuse what this machine has no room for, before Ray starts (< 1 s). Raises ClusterError.

    Does nothing where a cluster is connected to: `ray_session` asks that one once it is connected.
    """
    if not _address(cluster):
        check_room(ask_of(cluster), _machine_room(cluster))


@contextmanager
def ray_session(cluster: ClusterConfig, logs: Path) -> Iterator[Room]:
    """Ray for one run or sweep, quiet on the screen, stopped on leaving with no process left behind; yields what it has.

    logs: folder (absolute) for what Ray would print: driver.log, and Ray's own logs where the run failed.
    Connects instead where cluster.address or RAY_ADDRESS is set. Raises ClusterError where the run has no room.
    """
    preflight(cluster)
    logs.mkdir(parents=True, exist_ok=True)
    with _quiet_ray(logs / "ray_driver.log"):
        session = _connected(cluster) if _address(cluster) else _started(cluster, logs)
        with session as room:
            yield room


@contextmanager
def _started(cluster: ClusterConfig, logs: Path) -> Iterator[Room]:
    """A Ray of our own, with its files in a temporary folder of its own; only who has the user's token can talk to it.

    Without the dashboard: that takes 1.5 s and 11 processes more (2 cores), to show what progress and logs show.
    """
    import ray

    room = _machine_room(cluster)
    before = set(_descendants())
    _make_token()
    with _temporary_folder() as folder, _environment(SETTINGS), _closed_to_others(), _out_of_our_group():
        try:
            ray.init(
                address="local",
                num_cpus=int(room.cpus),
                num_gpus=int(room.gpus),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                job_config=_job_config(),
                _temp_dir=str(folder),
            )
            with reaped([process.pid for process in _descendants() if process not in before]):
                yield room
        except UserError:
            raise
        except BaseException:
            with contextlib.suppress(OSError):  # there may be none yet, and some may vanish
                shutil.copytree(folder / "session_latest" / "logs", logs / "ray_session", dirs_exist_ok=True)
            raise
        finally:
            started = [process for process in _descendants() if process not in before]
            ray.shutdown()
            _end(started)


@contextmanager
def _connected(cluster: ClusterConfig) -> Iterator[Room]:
    import ray

    given = _address(cluster)
    if given.startswith(("http://", "https://")):
        raise ClusterError(
            f"{given} is the dashboard of a Ray cluster, to which runs are sent: use `distcond submit train cluster=ray`, or "
            "leave cluster.address and RAY_ADDRESS empty to train on this machine."
        )
    address = _find(given)
    _check_token(address, given)
    if not any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):  # Ray would try for a minute
        raise ClusterError(
            f"this machine is no node of the Ray cluster at {given}; train on one that is, or send the run to the cluster's "
            "dashboard: distcond submit train cluster=ray cluster.address=http://HEAD:8265."
        )
    with _on_loopback() if address.startswith(LOOPBACK) else contextlib.nullcontext():
        ray.init(address=address, log_to_driver=False, job_config=_job_config())
    try:
        room = Room.of(ray.cluster_resources(), f"the cluster at {given}")
        check_room(ask_of(cluster), room)
        yield room
    finally:
        ray.shutdown()


def _find(given: str) -> str:
    """The host:port of a cluster where somebody answers, else ClusterError. NOTE: Ray itself would try for minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        address: str = canonicalize_bootstrap_address(given) or ""
        host, _, port = address.rpartition(":")
        try:
            _knock(host, port)
        except OSError:
            # NOTE: for loopback Ray takes the machine's address, at which one that we have started does not listen.
            if not given.startswith((LOOPBACK, "localhost")):
                raise
            address = f"{LOOPBACK}:{port}"
            _knock(LOOPBACK, port)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {given} ({str(error).rstrip('.')}); start one, or leave cluster.address and "
            "RAY_ADDRESS empty to train on this machine."
        ) from error
    return address


def _knock(host: str, port: str) -> None:
    """Raise OSError, or ValueError for what is no port, where nobody listens."""
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()


def _check_token(address: str, given: str) -> None:
    """Raise ClusterError where a cluster wants a token that is not ours. NOTE: Ray itself would ask for it for minutes."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    with init_grpc_channel(address) as channel:
        is_alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            is_alive(b"", timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:  # of any other trouble Ray says more
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ClusterError(
                    f"the Ray cluster at {given} wants a token, and not the one that was given, if any; set RAY_AUTH_MODE=token, "
                    "and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the one that it was started with."
                ) from error


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that is removed on leaving, or by the next run if this process has no time for it.

    NOTE: not inside the run folder: the paths of Ray's sockets may have 107 characters.
    """
    parent = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    for left in parent.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), left.open() as lock:  # another user's, or one that is held
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    hidden = folder / f".{LOCK}"
    with hidden.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hidden.rename(folder / LOCK)  # seen once it is held, or another start would remove the folder
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _OwnPath(list[str]):
    """Folders that are put in front of the workers' `sys.path`: those alone that this process imports from, too.

    NOTE: Ray adds the current folder, where a `numpy.py` or another `distcond` would be taken for the installed one.
    """

    def extend(self, folders: Iterable[str]) -> None:
        own = {str(Path(folder).absolute()) for folder in sys.path}
        super().extend(folder for folder in folders if folder in own)


def _job_config() -> Any:
    """What Ray is told of this process."""
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _OwnPath()
    return config


def _address(cluster: ClusterConfig) -> str:
    """Where to connect to; empty: start a Ray here. Inside a Ray job, RAY_ADDRESS is set by Ray."""
    return os.environ.get("RAY_ADDRESS") or cluster.address


def _machine_room(cluster: ClusterConfig) -> Room:
    return Room(_num_cpus(), _num_gpus() if cluster.gpus_per_worker else 0)


def _num_cpus() -> int:
    """Cores this process may use; a container's quota counts, in whole cores."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no quota: "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def _num_gpus() -> int:
    """GPUs as Ray will count them."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    visible = manager.get_current_process_visible_accelerator_ids()
    present: int = manager.get_current_node_num_accelerators()
    return present if visible is None else min(present, len(visible))


@contextmanager
def _quiet_ray(file: Path) -> Iterator[None]:
    """What Ray logs in this process goes to a file: it finds sys.stderr at the moment of writing."""
    with file.open("a") as stream, contextlib.redirect_stderr(stream):
        yield


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, for as long as Ray's processes are being started."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _closed_to_others() -> Iterator[None]:
    """A Ray that is started inside listens on 127.0.0.1 alone, and asks for the token even if another Ray here does not."""
    mode = os.environ.pop("RAY_AUTH_MODE", None)
    try:
        with _on_loopback():
            yield
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)
        os.environ.update({"RAY_AUTH_MODE": mode} if mode is not None else {})


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray's processes that are started inside have 127.0.0.1 for their node's address."""
    from ray._private import ray_constants

    # NOTE: what Ray 2.60 does on macOS. Its _node_ip_address="127.0.0.1" means all addresses, and its environment variable
    # RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is read when Ray is imported, which may be long ago.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _out_of_our_group() -> Iterator[None]:
    """Ray's processes that are started inside are no members of our process group.

    Whoever signals that group, as `timeout` does, asks us to save a checkpoint, for which Ray is needed. NOTE: Ray 2.60
    itself keeps from them SIGINT alone.
    """
    from ray._private import services

    before = services.ConsolePopen
    services.ConsolePopen = partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


def _make_token() -> None:
    """The file of the user's token, there and readable by nobody else, before Ray 2.60 writes one for all to read (0644)."""
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=token.parent) as file, contextlib.suppress(FileExistsError):  # made as 0600
        file.write(secrets.token_hex(32))
        file.flush()
        os.link(file.name, token)  # whole or not at all, and never in place of another
    if token.stat().st_uid == os.getuid():
        token.chmod(0o600)


def _descendants() -> list[psutil.Process]:
    processes: list[psutil.Process] = psutil.Process().children(recursive=True)
    return processes


def _end(processes: list[psutil.Process]) -> None:
    """Wait for processes that are ending, then kill those that are not."""
    for process in psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
