"""The README is true: its code runs, its commands compose, its files exist."""

import re
import shlex
from pathlib import Path

import pytest

from distcond.compose import compose

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line.split("#")[0])[1:]
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("distcond ")
]


COMPOSED = ("train", "sweep", "submit", "prepare")


def test_the_code_for_one_process_runs() -> None:
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "initialize" not in block]
    assert len(blocks) == 2  # the other one needs ranks: tests/train/test_initialize.py
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] in COMPOSED], ids=" ".join)
def test_commands_compose(command: list[str]) -> None:
    compose([word for word in command if word not in {"train", "sweep", "submit", "prepare", "--dry-run"}])


def test_named_files_exist() -> None:
    tree = README.split("## The code")[1]
    package = re.search(r"```\n(.*?)```", tree, re.S)
    assert package is not None
    folder = Path("distcond")
    for line in package[1].splitlines():
        head = re.match(r"\s+(\w+)/\s", line)
        if not line.startswith(" " * 8):  # else it goes on with the folder above
            folder = Path("distcond") / head[1] if head else Path("distcond")
        for name in re.findall(r"\b\w+\.py\b", line):
            assert (ROOT / folder / name).exists(), f"{folder / name} in the code map"


def test_the_code_map_names_every_sub_package() -> None:
    for folder in (ROOT / "distcond").iterdir():
        if (folder / "__init__.py").exists():
            assert f"{folder.name}/" in README


@pytest.mark.parametrize(
    "readme",
    [
        "README.md",
        "conf/README.md",
        "launch/README.md",
        "distcond/bench/README.md",
        "distcond/deploy/README.md",
        "distcond/nn/README.md",
    ],
)
def test_links_lead_to_files(readme: str) -> None:
    file = ROOT / readme
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", file.read_text()):
        assert (file.parent / target).exists(), f"{target} in {readme}"


def test_every_promise_is_linked_to_its_test() -> None:
    section = README.split("## Never lose a step")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 13
    assert all(re.search(r"\]\(tests/[\w/]+\.py\) \|$", row) for row in rows)
