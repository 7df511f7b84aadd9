"""The wheel: holds conf/ and launch/, and works from any folder, the checkout included."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from distcond.compose import compose, to_dict

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """Folder with the wheel and its command, without dependencies."""
    folder = wheel.parent / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--target", folder, wheel, cwd=wheel.parent)
    return folder


@pytest.mark.parametrize("resource", ["conf", "launch"])
def test_the_wheel_holds_every_resource(wheel: Path, resource: str) -> None:
    files = [file for file in (ROOT / resource).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert files
    assert {f"distcond/{file.relative_to(ROOT).as_posix()}" for file in files} <= set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    return to_dict(compose([]))


def test_the_installed_command_composes_from_any_folder(installed: Path, default: dict[str, Any], tmp_path: Path) -> None:
    shown = run(installed / "bin" / "distcond", "train", "--cfg", "job", cwd=tmp_path, PYTHONPATH=str(installed))
    assert yaml.safe_load(shown) == default
    assert not list(tmp_path.iterdir())


def test_the_installed_package_composes_inside_the_checkout(installed: Path, default: dict[str, Any]) -> None:
    where = "import distcond.resources as r, distcond.compose as c; c.compose([]); print(r.resource_dir('conf'))"
    assert run(sys.executable, "-P", "-c", where, cwd=ROOT, PYTHONPATH=str(installed)).strip() == str(
        installed / "distcond" / "conf"
    )
    shown = run(sys.executable, "-m", "distcond", "train", "--cfg", "job", cwd=ROOT, PYTHONPATH=str(installed))
    assert yaml.safe_load(shown) == default
