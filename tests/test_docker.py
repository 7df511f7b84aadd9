import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray

import distcond

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def test_dockerfile_has_no_lint() -> None:
    found = subprocess.run(
        [str(BIN / "hadolint"), "--no-color", "--failure-threshold", "style", str(DOCKERFILE)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_image_holds_the_ray_that_is_installed_and_asked_for() -> None:
    tag = re.search(r"^FROM rayproject/ray:(\S+)-py311-cpu$", DOCKERFILE.read_text(), re.MULTILINE)
    assert tag is not None
    assert tag[1] == ray.__version__


def test_image_installs_a_torch_that_the_project_allows() -> None:
    asked = next(line for line in _project()["dependencies"] if line.startswith("torch"))
    low, high = re.fullmatch(r"torch>=([\d.]+),<([\d.]+)", asked).groups()  # type: ignore[union-attr]
    pinned = re.search(r'"torch==([\d.]+)"', DOCKERFILE.read_text())
    assert pinned is not None
    assert _number(low) <= _number(pinned[1]) < _number(high)


def test_image_carries_the_version_of_the_project() -> None:
    assert f"ARG VERSION={distcond.__version__}\n" in DOCKERFILE.read_text()
    assert _project()["version"] == distcond.__version__


def test_image_is_not_root_and_can_be_asked_for_its_health() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["1000:100"]
    assert any("ray" in line and "health-check" in line for line in lines)
    assert any("RAY_AUTH_MODE=token" in line for line in lines)


@pytest.mark.parametrize("source", ["pyproject.toml", "README.md", "LICENSE", "conf", "launch", "distcond"])
def test_everything_copied_is_let_into_the_build_and_exists(source: str) -> None:
    assert (ROOT / source).exists()
    assert re.search(rf"^COPY .*\b{re.escape(source)} ", DOCKERFILE.read_text(), re.MULTILINE)
    assert f"!{source}\n" in (ROOT / ".dockerignore").read_text()


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
