"""distcond.load in an environment of torch, safetensors and the wheel: nothing else that distcond requires is there."""

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from distcond.cli import main
from distcond.config import Config
from distcond.opened import open_run
from tests.helpers import HANG_S

ROOT = Path(__file__).parents[2]
ABSENT = (
    "ray",
    "deepspeed",
    "hydra",
    "omegaconf",
    "wandb",
    "datasets",
    "numpy",
    "psutil",
    "rich",
    "matplotlib",
    "yaml",
    "pytest",
)
"What distcond or its tests require and torch does not."
CODE = """
import importlib, sys, warnings
warnings.simplefilter("ignore")  # torch misses numpy
absent, folder, file = sys.argv[1].split(","), *sys.argv[2:]
for name in absent:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == name, error
    else:
        sys.exit(f"{name} can be imported")
import distcond, torch
assert distcond.__file__.startswith(sys.prefix), distcond.__file__
logits, stats = distcond.load(folder)(torch.load(file))
torch.save({"logits": logits, "steps": stats.steps}, file + ".answers")  # to write safetensors would take numpy
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment: links to torch, safetensors and what these require, and the wheel without dependencies."""
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder / "venv")
    (site,) = folder.glob("venv/lib/python*/site-packages")
    source = Path(sysconfig.get_path("purelib"))
    for name in _parts_of("torch") | _parts_of("safetensors"):
        (site / name).symlink_to(source / name)
    python = [sys.executable, "-m"]
    _run([*python, "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    (wheel,) = folder.glob("*.whl")
    pip = [*python, "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    _run([*pip, "--target", str(site), str(wheel)], folder)
    return folder / "venv" / "bin" / "python"


def _parts_of(name: str, seen: set[str] | None = None) -> set[str]:
    """Names in site-packages of the files and folders of a distribution and of all that it requires."""
    seen = set() if seen is None else seen
    if name in seen:
        return set()
    seen.add(name)
    package = distribution(name)
    parts = {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}
    for line in package.requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            parts |= _parts_of(requirement.name, seen)
    return parts


def _run(command: list[str], folder: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--flatten"]])
def test_an_exported_model_answers_as_the_trained_one(alone: Path, text_run: Config, flags: list[str], tmp_path: Path) -> None:
    run = Path(text_run.run.dir) / text_run.run.name
    assert main(["export", str(run), "--out", str(tmp_path / "model"), *flags]) == 0
    file = tmp_path / "inputs.pt"
    inputs = torch.randint(256, (9, 16), generator=torch.Generator().manual_seed(0))
    torch.save(inputs, file)
    _run([str(alone), "-I", "-c", CODE, ",".join(ABSENT), str(tmp_path / "model"), str(file)], tmp_path)
    answers = torch.load(f"{file}.answers")
    with torch.no_grad():
        logits, stats = open_run(run).learner.eval().body(inputs, torch.full((9,), 16))
    # Folding sums 4 products in another order; logits around 1 in fp32.
    torch.testing.assert_close(answers["logits"], logits, rtol=0, atol=1e-5)
    assert torch.equal(answers["steps"], stats.steps)
    assert flags or torch.equal(answers["logits"], logits)
