import fcntl
import socket
import time
from pathlib import Path

import pytest

from distcond.cluster import local
from distcond.cluster.local import preflight, ray_session
from distcond.config import ClusterConfig
from distcond.errors import ClusterError


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_preflight_judges_this_machine_unless_a_cluster_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterConfig(num_workers=10**6)
    with pytest.raises(ClusterError, match="asks for 1e\\+06 CPUs; this machine has"):
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
