import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

import distcond

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
IMAGES = {"cpu": DOCKERFILE, "gpu": ROOT / "docker" / "Dockerfile.gpu"}
COMPOSE = ROOT / "docker" / "compose.yaml"


@pytest.fixture(params=IMAGES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def text(kind: str) -> str:
    return IMAGES[kind].read_text()


def test_dockerfile_has_no_lint(kind: str) -> None:
    found = subprocess.run(
        [str(BIN / "hadolint"), "--no-color", "--failure-threshold", "style", str(IMAGES[kind])],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_image_holds_the_ray_that_is_installed_and_asked_for(kind: str, text: str) -> None:
    tag = re.search(rf"^FROM rayproject/ray:(\S+)-py311-{kind}$", text, re.MULTILINE)
    assert tag is not None
    assert tag[1] == ray.__version__


def test_image_installs_a_torch_that_the_project_allows(text: str) -> None:
    asked = next(line for line in _project()["dependencies"] if line.startswith("torch"))
    low, high = re.fullmatch(r"torch>=([\d.]+),<([\d.]+)", asked).groups()  # type: ignore[union-attr]
    pinned = re.search(r'"torch==([\d.]+)"', text)
    assert pinned is not None
    assert _number(low) <= _number(pinned[1]) < _number(high)


def test_image_carries_the_version_of_the_project(text: str) -> None:
    assert f"ARG VERSION={distcond.__version__}\n" in text
    assert _project()["version"] == distcond.__version__


def test_image_is_not_root_and_can_be_asked_for_its_health(text: str) -> None:
    lines = text.splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["1000:100"]
    assert any("ray" in line and "health-check" in line for line in lines)
    assert any("RAY_AUTH_MODE=token" in line for line in lines)


@pytest.mark.parametrize("source", ["pyproject.toml", "README.md", "LICENSE", "conf", "launch", "distcond"])
def test_everything_copied_is_let_into_the_build_and_exists(source: str, text: str) -> None:
    assert (ROOT / source).exists()
    assert re.search(rf"^COPY .*\b{re.escape(source)} ", text, re.MULTILINE)
    assert f"!{source}\n" in (ROOT / ".dockerignore").read_text()


def test_the_gpu_image_compiles_operations_of_the_deepspeed_that_is_asked_for() -> None:
    text = IMAGES["gpu"].read_text()
    asked = next(line for line in _project()["dependencies"] if line.startswith("deepspeed"))
    low, high = re.fullmatch(r"deepspeed>=([\d.]+),<([\d.]+)", asked).groups()  # type: ignore[union-attr]
    pinned = re.search(r'DS_BUILD_FUSED_ADAM=1 .*\n.*--no-build-isolation "deepspeed==([\d.]+)"', text)
    assert pinned is not None
    assert _number(low) <= _number(pinned[1]) < _number(high)


# ---- the cluster of containers -----------------------------------------------------------------------------------------


def test_compose_file_follows_the_specification() -> None:
    words = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_compose_is_a_head_and_two_workers_closed_to_others() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    services = compose["services"]
    assert services["worker"]["deploy"]["replicas"] == 2
    published = {name: service.get("ports", []) for name, service in services.items()}
    assert published == {"head": ["127.0.0.1:8265:8265"], "worker": []}
    for service in services.values():
        assert f"--tag {service['image']} ." in DOCKERFILE.read_text()
        assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DOCKERFILE
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")  # refused where there is none
        assert service["volumes"] == ["runs:/home/ray/runs"]
        assert "health-check" in service["healthcheck"]["test"]
        assert service["cap_drop"] == ["ALL"] and not service.get("privileged")


@pytest.mark.parametrize("service", ["head", "worker"])
def test_commands_of_compose_are_ones_that_ray_takes(service: str) -> None:
    from ray.scripts.scripts import start

    words = yaml.safe_load(COMPOSE.read_text())["services"][service]["command"]
    assert words[:2] == ["ray", "start"]
    start.make_context("start", words[2:], resilient_parsing=False)


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
