"""A configuration from a stranger runs no code and reads no environment, wherever it comes from."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from distcond.cli import main
from distcond.compose import compose, from_dict, load_config, override
from distcond.config import Config
from distcond.config.files import FUNCTIONS, PATHS
from distcond.errors import ConfigError

pytestmark = pytest.mark.thorough

SECRET = "hunter2hunter2"
LEAK = "${oc.env:PLANTED_VALUE}"


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that planted code would make; it is not there when the test ends."""
    monkeypatch.setenv("PLANTED_VALUE", SECRET)  # a name that redaction does not know
    handlers, level = logging.root.handlers[:], logging.root.level  # Hydra's --info sets others, for a process that ends
    yield tmp_path / "canary"
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    assert not (tmp_path / "canary").exists()


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit status, and what is on the screen: without the secret and, where refused, one line."""
    status = main(argv)
    out, err = capsys.readouterr()
    assert SECRET not in out + err
    assert status == 0 or (status, out, err.count("\n")) == (2, "", 1)
    return status, out + err


# --- no code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "_target_=os.mkdir",
        "+_target_=os.mkdir +path={canary}",
        "++model._target_=os.mkdir ++model.path={canary}",
        "+model.tree={{_target_:os.mkdir,path:{canary}}}",
        "data.files=[{{_target_:os.mkdir,path:{canary}}}]",
        "run.name={{_target_:os.mkdir,path:{canary}}}",
        "hydra.callbacks.a={{_target_:os.mkdir,path:{canary}}}",
        "+hydra.sweeper._target_=os.mkdir",
    ],
)
def test_a_class_to_call_is_no_key(words: str, canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words.format(canary=canary).split(" ")
    assert answer(capsys, "train", "--dry-run", *given)[0] == 2
    answer(capsys, "train", "--cfg", "job", *given)  # shows some, but calls none


CALL = "{{_target_: os.mkdir, path: {canary}}}"


@pytest.mark.parametrize(
    ("file", "text", "status"),
    [
        ("model/mine", f"tree: {CALL}\n", 2),
        ("model/mine", "_target_: os.mkdir\npath: {canary}\n", 2),
        ("experiment/mine", f"# @package _global_\nrun: {CALL}\n", 2),
        ("experiment/mine", f"# @package hydra.callbacks\nmine: {CALL}\n", 0),  # composed, and never called
        (
            "experiment/mine",
            f"# @package _global_\nhydra: {{{{callbacks: {{{{a: {CALL}}}}}, sweeper: {CALL}, launcher: {CALL}}}}}\n",
            0,
        ),
        ("optim/mine", f"deepspeed: {CALL}\n", 0),
        ("sweep/mine", f"space: {CALL}\n", 0),
    ],
)
def test_a_class_to_call_in_a_file_is_refused_or_never_called(
    file: str,
    text: str,
    status: int,
    canary: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).parent.mkdir()
    (tmp_path / f"{file}.yaml").write_text(text.format(canary=canary))
    chosen = ["--config-dir", str(tmp_path), file.replace("/", "=")]
    for flags in (["--dry-run"], ["--cfg", "job"], ["--cfg", "all"], ["--info", "all"], ["--help"]):
        assert answer(capsys, "train", *flags, *chosen)[0] == status, flags


def test_a_class_to_call_in_a_run_folder_is_refused(tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {CALL}\n".format(canary=canary))
    assert answer(capsys, "evaluate", str(tmp_path))[0] == 2
    assert answer(capsys, "train", "--config", f"{tmp_path}/config.yaml")[0] == 2


def test_deepspeed_is_not_told_which_modules_to_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "optim.deepspeed.torch_autocast={enabled: true, lower_precision_safe_modules: [evil.Evil]}"
    assert "set optim.precision instead" in answer(capsys, "train", "--dry-run", given)[1]


# --- no environment ---------------------------------------------------------------------------------------------------

READERS = [
    *(
        LEAK,
        "x${oc.env:PLANTED_VALUE,a}",
        "${ oc.env : PLANTED_VALUE }",
        "${oc.decode:'1'}",
        "${oc.create:{a:1}}",
        "${hydra:job.name}",
    ),
    *("${oc.deprecated:seed}", "${oc.dict.keys:model}", "${oc.${run.group}:PLANTED_VALUE}", "${python_version:}", "${nobody:1}"),
    *("${oc.select:seed,${oc.env:PLANTED_VALUE}}", "${oc.select:'${oc.env:PLANTED_VALUE}'}", "${now:${oc.env:PLANTED_VALUE}}"),
]


@pytest.mark.parametrize("text", READERS)
def test_a_function_that_could_read_anything_is_refused_everywhere(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "is not filled in, only keys are"
    quoted = "'" + text.replace("'", "\\'") + "'"
    for given in (f"run.name={quoted}", f"optim.deepspeed.a={quoted}", f"sweep.space.run.name=[{quoted}]", f"data={text}"):
        assert told in answer(capsys, "train", "--dry-run", given)[1], given
        assert told in answer(capsys, "train", "--cfg", "job", "--resolve", given)[1], given
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"run": {"name": text}}))
    assert told in answer(capsys, "train", "--config", f"{tmp_path}/config.yaml")[1]
    assert told in answer(capsys, "evaluate", str(tmp_path))[1]
    for build in (lambda: from_dict({"run": {"name": text}}), lambda: override(Config(), {"run.name": text})):
        with pytest.raises(ConfigError, match=told):
            build()


@pytest.mark.parametrize(
    "text",
    [
        "# @package _global_\nrun: {name: '${oc.env:PLANTED_VALUE}'}\n",
        '# @package _global_\nrun: {name: "\\u0024\\x7boc.env:PLANTED_VALUE}"}\n',
        '# @package _global_\nrun: {name: "$\\\n  {oc.env:PLANTED_VALUE}"}\n',
        "# @package _global_\ndefaults:\n  - override /data: ${oc.env:PLANTED_VALUE}\n",
        "# @package _global_\ndefaults:\n  - ${oc.env:PLANTED_VALUE}\n",
        "# @package _global_\ndefaults:\n  - /other/deep\n",
        "# @package _global_\nhydra: {job: {name: '${oc.env:PLANTED_VALUE}'}}\n",
    ],
)
@pytest.mark.parametrize("flags", [["--dry-run"], ["--cfg", "all"], ["--info", "defaults"], ["--help"]])
def test_a_file_of_ones_own_reads_no_environment(
    text: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("experiment", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    (tmp_path / "other" / "deep.yaml").write_text("run: {name: '${oc.env:PLANTED_VALUE}'}\n")
    assert answer(capsys, "train", *flags, "--config-dir", str(tmp_path), "experiment=mine")[0] == 2


def test_what_is_left_of_a_reference_is_refused_because_it_would_be_filled_in_later() -> None:
    with pytest.raises(ConfigError, match=r"run\.name=\$\{seed\}: \$\{ is for references alone"):
        compose(["run.name='\\${seed}'"])


def test_keys_the_time_and_a_default_are_filled_in(tmp_path: Path) -> None:
    assert FUNCTIONS == ("now", "oc.select")
    words = [
        "run.name='s${seed}-${now:%Y}-${oc.select:nope,none}'",
        "model.halting.kind=act",
        "train.eval_every=${train.max_steps}",
    ]
    config = compose(words)
    assert config.run.name.startswith("s0-2") and config.run.name.endswith("-none") and config.train.eval_every == 900
    (tmp_path / "config.yaml").write_text("seed: 7\nrun: {name: 's${seed}'}\n")
    assert load_config(tmp_path / "config.yaml").run.name == "s7"


@pytest.mark.parametrize("key", ["data.files", "optim.deepspeed", "model.tree", "optim.lr"])
def test_a_reference_brings_only_what_its_key_takes(key: str) -> None:
    with pytest.raises(ConfigError):
        compose([f"{key}=${{run.dir}}"])


def test_other_users_of_omegaconf_keep_their_functions() -> None:
    before = {name: OmegaConf.has_resolver(name) for name in ("oc.env", "oc.decode", "oc.create", "oc.select")}
    compose([])
    assert {name: OmegaConf.has_resolver(name) for name in before} == before
    node: Any = OmegaConf.create({"a": LEAK})
    assert node.a == os.environ["PLANTED_VALUE"]


@pytest.mark.parametrize("key", ["data.tokenizer", "data.path", "data.files", "tracking.group"])
@pytest.mark.parametrize("text", ["a\0b", "\ud800"], ids=["NUL", "half"])
def test_what_no_file_can_be_named_is_refused(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}.* is no text: it holds a NUL, or half of a character\.$"):
        override(Config(), {key: [text] if key == "data.files" else text})
    assert override(Config(), {"data.tokenizer": "\udcff"})  # a byte of a name, as Python tells it


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("text", ["x" * 201, "x/" * 2000, "a\0b", "a\nb", "\udcff"], ids=["name", "path", "NUL", "line", "byte"])
def test_a_folder_that_cannot_be_made_is_refused(key: str, text: str) -> None:
    if key.endswith("name"):
        text = text.replace("/", "x")
    reason = "no text: it holds a NUL, or half of a character" if "\0" in text else "too long for a folder, or no plain text"
    with pytest.raises(ConfigError, match=rf"^{key}=.* is {reason}\.$"):
        override(Config(), {key: text})
    assert override(Config(), {key: "é" * 100})
