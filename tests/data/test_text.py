"""Byte corpora from files: what is in them and what is held out."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from distcond.compose import load_config, save_config
from distcond.config import Config, DataConfig
from distcond.data.corpus import Corpus
from distcond.data.parts import FileParts, Part, cut, grouped
from distcond.data.text import (
    Holdout,
    TextFile,
    _parts,
    absolute_paths,
    local_files,
    open_stdlib,
    open_text,
)
from distcond.errors import DataError

FRACTION = 0.2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 files in two folders; every line of file i says <i>."""
    for number in range(40):
        file = tmp_path / "corpus" / ("ab"[number % 2]) / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<{number}>\n" * (number + 1))
    return tmp_path / "corpus"


def open_files(folder: Path, *files: str | Path, fraction: float = FRACTION) -> Corpus:
    patterns = [str(file) for file in files or (folder / "**" / "*.txt",)]
    cache = str(folder.parent / "cache")
    return open_text(DataConfig(name="text", files=patterns, cache_dir=cache, validation_fraction=fraction))


def lines(data: bytes) -> list[str]:
    return data.decode().splitlines()


def test_every_file_is_whole_in_one_split_and_no_other(folder: Path) -> None:
    corpus = open_files(folder)
    train, validation = lines(corpus.train.tobytes()), lines(corpus.validation.tobytes())
    assert sorted(train + validation) == sorted(f"<{number}>" for number in range(40) for _ in range(number + 1))
    assert not set(train) & set(validation)
    assert set(validation) == {f"<{Path(name).stem}>" for name in corpus.manifest["validation"]["files"]}
    assert 0 < len(corpus.manifest["validation"]["files"]) < 20


def test_the_split_goes_by_path_below_the_root_wherever_that_is(folder: Path) -> None:
    before = open_files(folder).manifest
    moved = folder.rename(folder.with_name("elsewhere"))
    assert open_files(moved).manifest == before


def test_a_new_file_changes_the_fate_of_no_other(folder: Path) -> None:
    before = set(open_files(folder).manifest["validation"]["files"])
    (folder / "a" / "new.txt").write_text("new")
    after = set(open_files(folder).manifest["validation"]["files"])
    assert after - {"a/new.txt"} == before


def test_a_held_out_text_is_not_trained_on_under_another_name(folder: Path) -> None:
    for file in list(folder.rglob("*.txt")):
        for copy in range(3):
            (file.parent / f"copy{copy}-{file.name}").write_bytes(file.read_bytes())
    corpus = open_files(folder)
    train, validation = lines(corpus.train.tobytes()), lines(corpus.validation.tobytes())
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == sum(number + 1 for number in range(40))


def test_of_a_lone_file_the_end_is_held_out(folder: Path) -> None:
    (folder / "lone").write_bytes(bytes(range(250)))
    corpus = open_files(folder, folder / "lone")
    assert corpus.train.tobytes() == bytes(range(200)) and corpus.validation.tobytes() == bytes(range(200, 250))


def test_a_file_named_twice_counts_once(folder: Path) -> None:
    assert len(local_files([str(folder / "a" / "*.txt"), str(folder / "a" / "0.txt")])) == 20


@pytest.mark.parametrize("change", ["longer", "newer", "fraction"])
def test_a_changed_source_is_prepared_again(folder: Path, change: str) -> None:
    before, file = open_files(folder), folder / "a" / "38.txt"
    if change == "longer":
        file.write_text(file.read_text() + "<more>\n")
    elif change == "newer":
        file.write_text(file.read_text().replace("<38>", "<83>"))
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    after = open_files(folder, fraction=0.9 if change == "fraction" else FRACTION)
    assert before.manifest != after.manifest


@pytest.mark.parametrize("fraction", [1e-9, 0.3, 1 - 1e-9])
@pytest.mark.parametrize("number", [2, 3, 50])
def test_both_splits_get_something(fraction: float, number: int) -> None:
    names = [str(name) for name in range(number)]
    flags = [Holdout.of(names, fraction).holds(name) for name in names]
    assert any(flags) and not all(flags)


def test_the_fraction_is_that_of_the_files() -> None:
    """Of 10,000 names at 0.05 the standard error is 0.0022."""
    names = [str(name) for name in range(10_000)]
    assert abs(sum(map(Holdout.of(names, 0.05).holds, names)) / 10_000 - 0.05) < 0.009


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["nowhere.txt"], r"'.*nowhere.txt' matches no file"),
        (["a/*.txt", "none/*.txt"], r"none/\*\.txt' matches no file"),
        (["a"], r"matches only folders.*/a/\*\*/\*\.txt"),
        (["empty"], r"all 1 files are empty"),
        (["x" * 300], r"x+' cannot be looked for \(File name too long\); name other files"),
    ],
)
def test_mistakes_are_named_in_one_line(folder: Path, files: list[str], message: str) -> None:
    (folder / "empty").touch()
    with pytest.raises(DataError, match=message) as caught:
        open_files(folder, *(folder / file for file in files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_that_goes_away_is_named(number: int) -> None:
    files = [TextFile(str(name), f"/nowhere/{name}", 5, 0) for name in range(number)]
    with pytest.raises(DataError, match=r"/nowhere/0 cannot be read \(No such file"):
        list(FileParts(tuple(_parts(files, FRACTION, by_lines=False))).chunks())


def test_a_file_that_becomes_shorter_is_named(folder: Path) -> None:
    path = str(folder / "a" / "0.txt")
    with pytest.raises(DataError, match=r"0\.txt has become shorter"):
        list(FileParts((Part("train", "0.txt", path, 0, 100, 1),)).chunks())


@pytest.mark.parametrize("most", [1, 7, 100, 1000, 10**6])
@pytest.mark.parametrize("by_lines", [False, True])
@pytest.mark.parametrize("pattern", ["*/*.txt", "b/39.txt"])
def test_shards_put_together_are_the_text_whatever_their_size(folder: Path, most: int, by_lines: bool, pattern: str) -> None:
    """Each has `most` bytes at the most, or a line; documents are counted where they begin."""
    parts = list(_parts(local_files([str(folder / pattern)]), FRACTION, by_lines))
    shards = [
        FileParts(tuple(group)) for group in grouped((piece for part in parts for piece in cut(part, most, by_lines)), most)
    ]
    whole = list(FileParts(tuple(parts)).chunks())
    found = [list(shard.chunks()) for shard in shards]
    for split in ("train", "validation"):
        text = b"".join(chunk.data for chunk in whole if chunk.split == split)
        assert b"".join(chunk.data for shard in found for chunk in shard if chunk.split == split) == text
        assert not by_lines or all(chunk.data.endswith(b"\n") for shard in found for chunk in shard)
    assert sum(chunk.documents for shard in found for chunk in shard) == (40 if "*" in pattern else 2)
    assert max(sum(len(chunk.data) for chunk in shard) for shard in found) <= (max(most, 10) if by_lines else most)
    assert min(len(shard) for shard in found) > 0


def test_absolute_paths_mean_the_same_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config = absolute_paths(DataConfig(name="text", files=["a/*.txt", "b/1.txt"], cache_dir="cache"))
    here = open_text(config).manifest
    monkeypatch.chdir("/")
    assert open_text(config).manifest == here
    assert len(here["train"]["files"]) + len(here["validation"]["files"]) == 21
    assert config.cache_dir == str(folder / "cache") == absolute_paths(config).cache_dir


@pytest.mark.parametrize("pattern", ["a/*.txt", "~/a/*.txt", "./**/[02].txt", "../[[]1]/a/0.txt", "a/0.txt", "~/a/0.txt"])
def test_brackets_in_the_name_of_the_current_folder_or_a_home_are_no_wildcards(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    here = folder.rename(folder.with_name("[1]"))
    shutil.copytree(here, here.with_name("1"))
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(here)
    expected = local_files([pattern])
    assert expected and all(str(Path(file.path).resolve()).startswith(f"{here}/") for file in expected)

    config = Config(data=absolute_paths(DataConfig(name="text", files=[pattern])))
    assert absolute_paths(config.data).files == config.data.files
    save_config(config, folder.parent / "config.yaml")
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/")
    assert local_files(load_config(folder.parent / "config.yaml").data.files) == expected


def test_the_path_of_a_file_that_is_there_is_no_pattern(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = folder.rename(folder.with_name("[1]"))
    (here / "a[0].txt").write_text("text\n")
    monkeypatch.chdir(here)
    assert absolute_paths(DataConfig(name="text", files=["a[0].txt"])).files == [f"{here}/a[0].txt"]


def test_a_missing_file_is_not_looked_for_in_a_folder_of_similar_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.with_name("[c]orpus")).mkdir()
    monkeypatch.chdir(folder.with_name("[c]orpus"))
    with pytest.raises(DataError, match=r"'a/0\.txt' matches no file"):
        local_files(["a/0.txt"])


@pytest.mark.parametrize(
    ("path", "files", "expected"),
    [
        ("json", ["a/0.txt", "hf://x/y"], ["{}/a/0.txt", "hf://x/y"]),
        ("some/name", ["data/*.parquet"], ["data/*.parquet"]),
    ],
)
def test_names_on_the_hub_stay_as_they_are(
    path: str, files: list[str], expected: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    config = absolute_paths(DataConfig(name="hub", path=path, files=files))
    assert config.path == path and config.files == [file.format(folder) for file in expected]


def test_stdlib_is_the_sources_of_the_library_and_nothing_else(tmp_path: Path) -> None:
    corpus = open_stdlib(DataConfig(cache_dir=str(tmp_path)))
    root = Path(sysconfig.get_path("stdlib"))
    splits = {split: corpus.manifest[split]["files"] for split in ("train", "validation")}
    assert not set(splits["train"]) & set(splits["validation"])
    expected = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    expected = {name for name in expected if not {"site-packages", "dist-packages"} & set(name.split("/"))}
    named = set(splits["train"]) | set(splits["validation"])
    assert named <= expected
    assert all((root / name).stat().st_size < 500 for name in expected - named)  # empty files and copies
    for split, names in splits.items():
        assert names == sorted(names)
        assert getattr(corpus, split).tobytes() == b"".join((root / name).read_bytes() for name in names)
