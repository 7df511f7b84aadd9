"""Byte corpora from Hugging Face data sets, here from local files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from distcond.config import DataConfig
from distcond.data.corpus import Corpus
from distcond.data.hub import open_hub
from distcond.errors import DataError


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` reads this where it is imported, as a rule in the first of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        yield


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {number} ü", "number": number}) + "\n" for number in range(2500)))
    return file


def open_rows(tmp_path: Path, path: str = "json", column: str = "text", files: list[str] | None = None) -> Corpus:
    cache = str(tmp_path / "cache")
    return open_hub(DataConfig(name="hub", path=path, column=column, files=files or [], cache_dir=cache))


def test_every_row_is_a_line_of_one_split(tmp_path: Path, rows: Path) -> None:
    corpus = open_rows(tmp_path, files=[str(rows)])
    train, validation = (getattr(corpus, split).tobytes().decode().splitlines() for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(f"row {number} ü" for number in range(2500))
    assert abs(len(validation) / 2500 - 0.05) < 0.018  # four standard errors


def test_a_changed_file_is_prepared_again_and_an_unchanged_one_is_not(tmp_path: Path, rows: Path) -> None:
    before = open_rows(tmp_path, files=[str(rows)]).manifest
    prepared = list((tmp_path / "cache" / "corpora").iterdir())
    assert open_rows(tmp_path, files=[str(tmp_path / "*.jsonl")]).manifest == before
    assert list((tmp_path / "cache" / "corpora").iterdir()) == prepared
    rows.write_text(rows.read_text() + json.dumps({"text": "new", "number": 0}) + "\n")
    assert open_rows(tmp_path, files=[str(rows)]).manifest != before


def test_a_folder_is_a_data_set(tmp_path: Path, rows: Path) -> None:
    rows.rename((tmp_path / "folder").with_suffix(".jsonl"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl").rename(tmp_path / "folder" / "train.jsonl")
    corpus = open_rows(tmp_path, path=str(tmp_path / "folder"))
    assert corpus.train.tobytes().startswith(b"row ")


@pytest.mark.parametrize(
    ("column", "lines", "message"),
    [
        ("title", '{"text": "a"}\n', r"data\.column='title' is not in json; it has text\."),
        ("number", '{"number": 1}\n', r"data\.column='number' of json holds int64"),
        ("text", "{no json\n", r"'json' cannot be loaded: JSON parse error"),
    ],
)
def test_data_that_is_no_text_is_refused(tmp_path: Path, column: str, lines: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message) as caught:
        open_rows(tmp_path, column=column, files=[str(tmp_path / "bad.jsonl")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "files", "message"),
    [
        ("json", [], r"data\.path=json reads local files; name them"),
        ("json", ["nowhere/*.jsonl"], r"'nowhere/\*\.jsonl' matches no file"),
        ("no/such_data_set", [], r"'no/such_data_set' cannot be loaded: .*reach.*network\."),
    ],
)
def test_data_that_cannot_be_had_is_named_in_one_line(tmp_path: Path, path: str, files: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_rows(tmp_path, path=path, files=files)
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_data_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    with pytest.raises(DataError, match="cannot be loaded"):
        open_rows(tmp_path, path=str(tmp_path / "evil"))
    assert not (tmp_path / "canary").exists()
