import contextlib
import fcntl
import os
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from distcond.cluster import local
from distcond.cluster.local import preflight, ray_session
from distcond.cluster.policy import Room
from distcond.config import ClusterConfig
from distcond.errors import ClusterError
from tests.cluster.processes import TIMEOUT_S


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_preflight_judges_this_machine_unless_a_cluster_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterConfig(num_workers=2**16)
    with pytest.raises(ClusterError, match="asks for 65536 CPUs; this machine has"):
        preflight(cluster)
    monkeypatch.setenv("RAY_ADDRESS", "host:6379")
    preflight(cluster)


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "nonsense", "ray://127.0.0.1:{}"])
def test_a_cluster_that_does_not_answer_is_told_at_once(address: str, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # but does not listen
        address = address.format(unused.getsockname()[1])
        start = time.monotonic()
        with (
            pytest.raises(ClusterError, match=f"^no Ray cluster answers at {address} ") as refusal,
            ray_session(ClusterConfig(address=address), tmp_path),
        ):
            pass
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - start < 5


def test_a_dashboard_is_not_what_train_connects_to(tmp_path: Path) -> None:
    with (
        pytest.raises(ClusterError, match=r"^http://host:8265 is the dashboard .* use `distcond submit train cluster=ray`"),
        ray_session(ClusterConfig(address="http://host:8265"), tmp_path),
    ):
        pass


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_has_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    left, held, other = tmp_path / "distcond-ray-left", tmp_path / "distcond-ray-held", tmp_path / "ray"
    for folder in (left, held, other):
        folder.mkdir()
        (folder / "lock").touch()
    with (held / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with local._temporary_folder() as own:
            assert sorted(tmp_path.iterdir()) == sorted([held, other, own])
        assert sorted(tmp_path.iterdir()) == sorted([held, other])


def test_a_folder_is_seen_by_other_starts_only_once_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    seen, flock = [], fcntl.flock

    def watched(*given: Any) -> None:
        seen.append(list(tmp_path.glob(f"*/{local.LOCK}")))
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", watched)
    with local._temporary_folder() as own:
        assert list(tmp_path.glob(f"*/{local.LOCK}")) == [own / local.LOCK]
    assert seen == [[]]


def test_workers_import_from_no_folder_that_this_process_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "own"), ""])
    monkeypatch.chdir(tmp_path)
    config = local._job_config()
    config._py_driver_sys_path.extend([str(tmp_path / "own"), str(tmp_path / "other"), str(tmp_path)])
    assert config._py_driver_sys_path == [str(tmp_path / "own"), str(tmp_path)]  # "" is the current folder
    sys.path.remove("")
    config = local._job_config()
    config._py_driver_sys_path.extend([str(tmp_path)])
    assert config._py_driver_sys_path == []


def test_a_ray_that_fails_before_it_writes_a_log_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("no port is free")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(RuntimeError, match="no port is free"), ray_session(ClusterConfig(), tmp_path):
        pass


def test_the_token_is_made_once_whole_and_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    token = tmp_path / ".ray" / "auth_token"
    mask = os.umask(0)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: local._make_token(), range(8)))
    finally:
        os.umask(mask)
    made = token.read_text()
    assert len(made) == 64 and set(made) <= set("0123456789abcdef")
    assert (stat.S_IMODE(token.stat().st_mode), stat.S_IMODE(token.parent.stat().st_mode)) == (0o600, 0o700)
    assert list(token.parent.iterdir()) == [token]
    token.chmod(0o644)  # as Ray 2.60 makes it
    local._make_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and token.read_text() == made


@pytest.mark.ray
def test_every_port_of_a_local_ray_is_bound_to_loopback(shared_ray: Room) -> None:
    sockets = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # a worker of an earlier test that ends
            sockets[process.pid, process.name()] = process.net_connections("inet")
    assert {"gcs_server", "raylet"} <= {name for _, name in sockets}
    bound = {
        (name, one.laddr.ip)
        for (_, name), several in sockets.items()
        for one in several
        if one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM
    }
    assert len(bound) >= 4  # this process, gcs_server, raylet, an agent
    assert {ip for _, ip in bound} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, bound


@pytest.mark.ray
@pytest.mark.parametrize(
    "environment", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}], ids=["none", "wrong"]
)
def test_without_the_token_a_local_ray_lets_nobody_in(shared_ray: Room, environment: dict[str, str]) -> None:
    address = ray.get_runtime_context().gcs_address
    local._check_token(address, "here")  # with the token, it does
    ask = "from ray._raylet import GcsClient; from distcond.cluster.local import _check_token\n"
    ask += (
        f"try: GcsClient('{address}')\nexcept Exception as error: print(type(error).__name__)\n_check_token('{address}', 'here')"
    )
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", ask], env=others | environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.stdout == "AuthenticationError\n"
    assert "ClusterError: the Ray cluster at here wants a token" in done.stderr.splitlines()[-1]
