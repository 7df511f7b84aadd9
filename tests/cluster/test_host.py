import os
import threading
from pathlib import Path

import pytest

from distcond.cluster import host
from distcond.errors import ClusterError, DataError
from tests.helpers import changed, small_config, text_config

HERE, HEAD = "node (10.0.0.2)", "head (10.0.0.1)"


def test_the_interface_of_an_address_is_found_and_that_of_a_foreign_one_is_not() -> None:
    assert host.interface_of("127.0.0.1") in {"lo", "lo0"}
    assert host.interface_of("203.0.113.1") == ""  # reserved for documentation, RFC 5737


@pytest.mark.parametrize(
    ("address", "before", "after"),
    [
        ("127.0.0.1", None, {"lo", "lo0"}),
        ("127.0.0.1", "eth7", {"lo", "lo0"}),
        ("203.0.113.1", None, {None}),
        ("203.0.113.1", "eth7", {"eth7"}),
    ],
)
def test_gloo_is_bound_to_loopback_or_to_what_the_user_says(
    address: str, before: str | None, after: set[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", before or "restored afterwards")
    if before is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    host.choose_interface(address)
    assert os.environ.get("GLOO_SOCKET_IFNAME") in after


@pytest.mark.thorough
def test_a_file_that_appears_late_or_with_the_right_contents_is_proof(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    proof.write_text("of an earlier start")
    writer = threading.Timer(0.5, lambda: proof.write_text("now"))
    writer.start()
    host.check_storage(proof, "now", str(tmp_path), HERE, HEAD)
    writer.join()


@pytest.mark.parametrize("contents", [None, "of an earlier start"])
def test_a_folder_without_the_proof_is_not_shared(contents: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LOOK_AGAIN_S", 0.3)
    if contents:
        (tmp_path / "proof").write_text(contents)
    with pytest.raises(ClusterError) as refused:
        host.check_storage(tmp_path / "proof", "now", "/runs", HERE, HEAD)
    assert str(refused.value) == (
        "run.dir=/runs is not on storage that all hosts share: node (10.0.0.2) does not see what head (10.0.0.1) has written "
        "there; set run.dir to a folder that every host of the cluster mounts."
    )


def test_the_same_files_elsewhere_are_the_same_data(tmp_path: Path) -> None:
    expected = host.data_identity(text_config(tmp_path / "head"))
    host.check_data(text_config(tmp_path / "node"), expected, HERE, HEAD)


def test_other_or_missing_files_are_told_with_the_name_of_the_host(tmp_path: Path) -> None:
    config = text_config(tmp_path)
    expected = host.data_identity(config)
    (tmp_path / "corpus" / "3.txt").write_text("something else")
    with pytest.raises(DataError, match=r"node \(10\.0\.0\.2\) has other data=text than head \(10\.0\.0\.1\); put them"):
        host.check_data(config, expected, HERE, HEAD)
    config = changed(config, data__files=[f"{tmp_path}/none/*.txt"])
    with pytest.raises(
        DataError, match=r"node \(10\.0\.0\.2\): data\.files: .* matches no file .* on storage that all hosts share"
    ):
        host.check_data(config, expected, HERE, HEAD)


def test_generated_examples_are_the_same_everywhere() -> None:
    config = small_config("runs")
    host.check_data(config, host.data_identity(config), HERE, HEAD)
