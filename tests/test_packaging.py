"""The wheel: holds conf/ and launch/, works from any folder, the checkout included, and takes in tasks and models of others."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from distcond.compose import compose, to_dict
from tests.helpers import HANG_S

ROOT = Path(__file__).parents[1]
TOP = {"pyproject.toml", "distcond", "conf", "launch", "tests", "docker", "README.md", "LICENSE"}
"What is kept beside dot-files."


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG_S, check=False)
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
@pytest.mark.thorough
def test_the_wheel_holds_every_resource(wheel: Path, resource: str) -> None:
    files = [file for file in (ROOT / resource).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert files
    assert {f"distcond/{file.relative_to(ROOT).as_posix()}" for file in files} <= set(zipfile.ZipFile(wheel).namelist())


def test_nothing_else_lies_at_the_top() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a checkout that git answers for")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == TOP


def test_the_wheel_holds_what_the_report_is_made_of(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"distcond/report/page/{name}" for name in ("page.html.j2", "parts.html.j2", "style.css", "script.js")} <= set(names)


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    return to_dict(compose([]))


@pytest.mark.thorough
def test_the_installed_command_composes_from_any_folder(installed: Path, default: dict[str, Any], tmp_path: Path) -> None:
    shown = run(installed / "bin" / "distcond", "train", "--cfg", "job", cwd=tmp_path, PYTHONPATH=str(installed))
    assert yaml.safe_load(shown) == default
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_the_installed_package_composes_inside_the_checkout(installed: Path, default: dict[str, Any]) -> None:
    where = "import distcond.resources as r, distcond.compose as c; c.compose([]); print(r.resource_dir('conf'))"
    assert run(sys.executable, "-P", "-c", where, cwd=ROOT, PYTHONPATH=str(installed)).strip() == str(
        installed / "distcond" / "conf"
    )
    shown = run(sys.executable, "-m", "distcond", "train", "--cfg", "job", cwd=ROOT, PYTHONPATH=str(installed))
    assert yaml.safe_load(shown) == default


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with both wheels, that of distcond and the one that conf/README.md describes."""
    folder = tmp_path_factory.mktemp("environment")
    (project,) = re.findall(r"^```toml\n(# mine/pyproject.toml\n.*?)```", (ROOT / "conf" / "README.md").read_text(), re.M | re.S)
    (folder / "pyproject.toml").write_text(project)
    (folder / "mine.py").write_text((ROOT / "conf" / "mine.py").read_text())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder, cwd=folder)
    venv.create(folder / "venv")
    site = next(folder.glob("venv/lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--target", site, wheel, *folder.glob("*.whl"), cwd=folder)
    return folder / "venv" / "bin" / "python"


@pytest.mark.ray
@pytest.mark.thorough
def test_a_task_and_a_model_of_another_package_are_trained_and_measured(environment: Path, tmp_path: Path) -> None:
    for group, text in (("data", "name: majority\noptions: {bits: 9}\n"), ("model", "name: residual\nwidth: 8\n")):
        (tmp_path / "my" / group).mkdir(parents=True)
        (tmp_path / "my" / group / "mine.yaml").write_text(text)
    clean = {"PYTHONPATH": "", "RAY_ADDRESS": "", "PYTHONSAFEPATH": "1"}
    distcond = [environment, "-m", "distcond"]
    words = ["--config-dir", "my", "data=mine", "model=mine", "model.tree.depth=3", "model.halting.kind=act", "run.name=r"]
    words += [
        "train.max_steps=60",
        "train.eval_every=30",
        "optim.lr=0.01",
        "data.validation_examples=64",
        "tracking.mode=disabled",
    ]
    planned = run(*distcond, "train", "--dry-run", *words, cwd=tmp_path, **clean)
    assert "subtrees of the model's own trees over 2 ranks" in planned
    run(*distcond, "train", *words, "cluster.cpus_per_worker=0.5", cwd=tmp_path, **clean)
    last = json.loads((tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()[-1])
    first = json.loads((tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()[0])
    assert last["step"] == 60 and last["val/element_error"] < 0.3 and first["tree/materialized_nodes"] > 3
    tables = sorted(file.name for file in (tmp_path / "runs/r/checkpoints/step_00000060").glob("tables_*"))
    assert [name[:21] for name in tables] == ["tables_00000_of_00002", "tables_00001_of_00002"]
    assert json.loads((tmp_path / "runs/r/environment.json").read_text())["data"] == {"name": "majority", "bits": 9}
    run(*distcond, "evaluate", "runs/r", cwd=tmp_path, **clean)
    measured = json.loads((tmp_path / "runs/r/eval/step_00000060.json").read_text())
    assert measured["val/element_error"] == last["val/element_error"] and measured["macs_per_position"] > 0
    again = run(*distcond, "train", "--dry-run", "--config", "runs/r/config.yaml", cwd=tmp_path, **clean)
    assert "name: majority" in again and "a crash costs" in again
