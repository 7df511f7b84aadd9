"""Preparing with Ray Data: the same bytes as without it, however often it is killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from distcond.cli import main
from distcond.cluster.policy import Room
from distcond.cluster.prepare import in_parallel
from distcond.config import DataConfig
from distcond.data.corpus import in_turn
from distcond.data.shard import Shard
from distcond.data.tasks import open_source
from distcond.errors import DataError
from tests.cluster.processes import SLOW_START, wait_until
from tests.data.tokenizer import train_tokenizer

# Ray Data warns of its own settings.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 10 MiB: text in three files, rows in a fourth; and a tokenizer."""
    folder, words = tmp_path_factory.mktemp("corpus"), random.Random(0)
    lines = [" ".join(words.choices(["tree", "of", "weights", "über", "1406.7362"], k=20)) for _ in range(65_000)]
    for number in range(3):
        (folder / f"{number}.txt").write_text("\n".join(lines[number * 15_000 : (number + 1) * 15_000]))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[45_000:]))
    train_tokenizer(folder / "tokenizer.json", "\n".join(lines[:1000]))
    return folder


def settings(corpus: Path, kind: str, cache: Path) -> DataConfig:
    tokenizer = str(corpus / "tokenizer.json") if kind == "tokens" else ""
    common = {"tokenizer": tokenizer, "cache_dir": str(cache), "shard_mib": 1}
    if kind == "hub":
        return DataConfig(name="hub", path="json", files=[str(corpus / "rows.jsonl")], **common)
    return DataConfig(name="text", files=[str(corpus / "*.txt")], **common)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["text", "tokens", "hub"])
def test_ray_data_writes_the_same_files(
    kind: str, corpus: Path, tmp_path: Path, shared_ray: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    one = open_source(settings(corpus, kind, tmp_path / "one"), in_turn)
    sizes: list[int] = []

    def counted(shards: Sequence[Shard]) -> Sequence[int]:
        sizes.extend(in_parallel(shards))
        return sizes

    other = open_source(settings(corpus, kind, tmp_path / "other"), counted)
    assert files_of(one.folder) == files_of(other.folder) and len(sizes) == len(one.manifest["shards"]) >= 2
    assert sum(sizes) == sum(one.manifest[split]["bytes"] for split in ("train", "validation"))


@pytest.mark.ray
def test_a_mistake_in_a_task_is_told_as_in_this_process(corpus: Path, tmp_path: Path, shared_ray: Room) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a line\n" * 300_000 + b"\xff\n")
    config = settings(corpus, "tokens", tmp_path / "cache")
    config.files.append(str(tmp_path / "bad.txt"))
    with pytest.raises(DataError, match=r"^data\.tokenizer reads UTF-8, which .*bad\.txt is not") as told:
        open_source(config, in_parallel)
    assert "\n" not in str(told.value)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def command(corpus: Path, cache: Path, *words: str) -> list[str]:
    files = f"data.files=[{corpus}/*.txt]"
    return ["prepare", "data=text", files, "data.shard_mib=1", f"data.cache_dir={cache}", *words]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_preparation_goes_on_where_it_was(corpus: Path, tmp_path: Path) -> None:
    """By a tokenizer, for bytes are written too fast to be killed in the middle."""
    words = command(corpus, tmp_path / "cache", f"data.tokenizer={corpus / 'tokenizer.json'}")
    process = [sys.executable, "-m", "distcond", *words]
    started = subprocess.Popen(process, env=os.environ | SLOW_START, stdout=subprocess.PIPE, text=True)
    (folder,) = wait_until(lambda: list(tmp_path.glob("cache/corpora/*")))
    whole = wait_until(lambda: sorted(folder.glob("0*")), poll_s=0.001)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert not (folder / "manifest.json").exists()
    inodes = {path.name: path.stat().st_ino for path in whole}

    done = subprocess.run(process, env=os.environ | SLOW_START, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    figures = re.search(r"MB in .*, .* MB/s", done.stdout)
    assert figures and str(folder) in done.stdout
    assert {name: (folder / name).stat().st_ino for name in inodes} == inodes
    undisturbed = open_source(settings(corpus, "tokens", tmp_path / "undisturbed"))
    assert files_of(folder) == files_of(undisturbed.folder)


@pytest.mark.thorough
def test_what_is_prepared_is_read_and_said_so(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = open_source(settings(corpus, "text", tmp_path))
    assert main(command(corpus, tmp_path)) == 0
    out, err = capsys.readouterr()
    assert "was prepared already" in out and str(prepared.folder) in out and err == ""
    train = prepared.manifest["train"]
    assert f"train {train['bytes']:,} bytes of {train['documents']} documents" in out

    file = prepared.folder / "00001" / "train.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(command(corpus, tmp_path)) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "the sha256 of 00001/train.bin is not the manifest's" in err


def test_every_source_of_a_mixture_is_prepared(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = ", ".join(f"s{number}: {{name: text, files: ['{corpus}/{number}.txt'], weight: 1}}" for number in range(3))
    words = ["prepare", "data=mixture", f"data.sources={{{sources}}}", f"data.cache_dir={tmp_path}"]
    assert main(words) == 0
    assert capsys.readouterr().out.count(" MB/s\n") == 3 == len(list((tmp_path / "corpora").iterdir()))
    assert main(words) == 0
    assert capsys.readouterr().out.count("was prepared already") == 3


def test_one_shard_needs_no_ray(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(corpus, tmp_path), "data.shard_mib=64"]) == 0
    assert re.search(r"shards: 1\n +[\d.]+ MB in \d+:\d\d, [\d.]+ MB/s\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data=parity", "model=rnn"], r"data=parity is generated as it is needed; prepare a text"),
        (["data=text", "data.files=[/nowhere/*.txt]"], r"matches no file"),
        (["data=stdlib", "data.shard_mib=0"], r"data\.shard_mib=0 is below 1"),
        (["data=stdlib", "data.tokenizer=/nowhere/t.json"], r"data\.tokenizer=/nowhere/t\.json cannot be read \(No such file"),
        (["data.nmae=text"], r"there is no key data\.nmae; did you mean data\.name\?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *words, f"data.cache_dir={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(told, err)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
