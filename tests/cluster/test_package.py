import os
import zipfile
from pathlib import Path

import pytest

from distcond.cluster import package
from distcond.compose import load_config
from distcond.config import Config
from distcond.errors import ClusterError


def test_a_package_holds_the_code_and_the_configuration_and_no_more(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for file in (
        "pyproject.toml",
        "distcond/nn/tree.py",
        "conf/config.yaml",
        ".git/HEAD",
        ".env",
        "runs/first/metrics.jsonl",
        "distcond/__pycache__/x.pyc",
        "my-env/pyvenv.cfg",
        "my-env/lib/big.py",
        "distcond.egg-info/PKG-INFO",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")
    (root / "gone").symlink_to("nowhere")
    contents = package.list_contents(root)
    assert [str(file) for file in contents.files] == ["conf/config.yaml", "distcond/nn/tree.py", "pyproject.toml"]
    archive = zipfile.ZipFile(package.write_package(contents, Config(seed=7), tmp_path))
    assert set(archive.namelist()) == {package.CONFIG_FILE, *map(str, contents.files)}
    archive.extractall(tmp_path / "there")
    assert load_config(tmp_path / "there" / package.CONFIG_FILE) == Config(seed=7)


def test_equal_contents_make_an_equal_package(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "code.py").write_text("x")
    first = package.write_package(package.list_contents(tmp_path / "a"), Config(), tmp_path).read_bytes()
    os.utime(tmp_path / "a" / "code.py", (1, 1))
    assert package.write_package(package.list_contents(tmp_path / "a"), Config(), tmp_path).read_bytes() == first


def test_a_checkout_full_of_data_is_not_sent(tmp_path: Path) -> None:
    with (tmp_path / "corpus.bin").open("wb") as file:
        file.truncate(package.MAX_BYTES + 2**20)
    with pytest.raises(ClusterError, match=r"holds 101 MiB, more than the 100 MiB .*largest: corpus.bin, 101 MiB"):
        package.list_contents(tmp_path)


def test_an_installed_wheel_sends_the_configuration_alone(tmp_path: Path) -> None:
    archive = zipfile.ZipFile(package.write_package(package.list_contents(None), Config(), tmp_path))
    assert archive.namelist() == [package.CONFIG_FILE]


def test_this_checkout_is_found() -> None:
    assert package.find_checkout() == Path(__file__).parent.parent.parent
