"""Corpora from Hugging Face data sets, here from local files."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from distcond.config import DataConfig
from distcond.data.corpus import Corpus
from distcond.data.hub import open_hub
from distcond.data.text import Holdout
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


@pytest.mark.parametrize("shard_mib", [1, 64])
@pytest.mark.parametrize("path", ["json", "parquet", "arrow"])
def test_rows_are_the_same_text_from_any_format_in_any_shards(tmp_path: Path, path: str, shard_mib: int) -> None:
    """Two files of 1.3 MiB in all; a row without text is an empty line."""
    texts = [None if number % 1000 == 0 else f"row {number} " + "ü" * 20 for number in range(25_000)]
    files = []
    for part, some in enumerate((texts[:15_000], texts[15_000:])):
        table = pyarrow.table({"id": list(range(len(some))), "text": some})
        files.append(str(tmp_path / f"{part}.{path}"))
        if path == "parquet":
            pyarrow.parquet.write_table(table, files[-1])
        elif path == "arrow":
            with pyarrow.ipc.new_stream(files[-1], table.schema) as stream:
                stream.write_table(table)
        else:
            Path(files[-1]).write_text("".join(json.dumps({"id": 0, "text": text}) + "\n" for text in some))
    config = DataConfig(name="hub", path=path, files=files, cache_dir=str(tmp_path / "cache"), shard_mib=shard_mib)
    corpus = open_hub(config)
    assert len(corpus.manifest["shards"]) == (2 if shard_mib == 1 else 1)
    holdout = Holdout.of(map(str, range(len(texts))), config.validation_fraction)
    for split in ("train", "validation"):
        expected = [text or "" for number, text in enumerate(texts) if holdout.holds(str(number)) == (split == "validation")]
        assert getattr(corpus, split).tobytes().decode() == "".join(line + "\n" for line in expected)
        assert corpus.manifest[split]["documents"] == len(expected)


def test_one_of_a_data_sets_configurations_is_named_by_subset(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("prose", "verse"):
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {row}"}}\n' for row in range(30)))
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- {config_name: prose, data_files: prose.jsonl}\n- {config_name: verse, data_files: verse.jsonl}\n---\n"
    )
    given = {"name": "hub", "path": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    assert open_hub(DataConfig(**given, subset="verse")).train.tobytes().startswith(b"verse ")
    assert open_hub(DataConfig(**given, subset="prose")).train.tobytes().startswith(b"prose ")
    with pytest.raises(DataError, match=r"cannot be loaded: .*prose.*verse.*data\.subset") as caught:
        open_hub(DataConfig(**given))
    assert "\n" not in str(caught.value)


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


def test_a_name_with_wildcards_in_it_stands_for_that_file_alone(tmp_path: Path) -> None:
    names = ["a1", "a[1]", "b*c", "b**", "d?", "[!x]", "]"]
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps({"text": name}) + "\n")
    every = open_rows(tmp_path, files=[str(tmp_path / "*.json")])
    assert sorted((every.train.tobytes() + every.validation.tobytes()).decode().splitlines()) == sorted(names)
    one = open_rows(tmp_path, files=[str(tmp_path / "a[1].json")])
    assert one.train.tobytes() + one.validation.tobytes() == b"a[1]\n"


def test_a_folder_that_would_be_taken_for_another_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("set[1]", "set1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "link").symlink_to(tmp_path / "set[1]")
    for name in ("set[1]", "link"):
        with pytest.raises(DataError, match=r"data\.path='.*/set\[1\]' cannot be read .* rename the folder\.$") as caught:
            open_rows(tmp_path, path=str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_held_out_row_is_not_trained_on_from_a_copy_of_its_file_or_a_loop_of_links(tmp_path: Path, rows: Path) -> None:
    before = open_rows(tmp_path, files=[str(rows)]).manifest
    (tmp_path / "copy.jsonl").write_bytes(rows.read_bytes())
    (tmp_path / "loop").symlink_to(tmp_path)
    after = open_rows(tmp_path, files=[str(tmp_path / "**" / "*.jsonl")]).manifest
    assert after == before


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("json", b"", r"'json' cannot be loaded: StopIteration; check data\.path"),
        ("parquet", b"no parquet at all", r"'parquet' cannot be loaded: Parquet magic bytes not found"),
    ],
)
def test_a_broken_file_gives_one_line_that_says_why(
    tmp_path: Path, path: str, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", printed.append)
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [handler])
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_rows(tmp_path, path=path, files=[str(tmp_path / "broken")])
    assert not printed


@pytest.mark.parametrize(
    ("column", "lines", "message"),
    [
        ("title", '{"text": "a"}\n', r"data\.column='title' is not in json; it has text\."),
        ("number", '{"number": 1}\n', r"data\.column='number' of json holds int64"),
        ("text", "{no json\n", r"'json' cannot be loaded: JSON parse error"),
        ("text", b'{"text": "caf\xe9"}\n', r"Row 0 of the data set is not UTF-8 \(.* near b'caf\\xe9'\)"),
    ],
)
def test_data_that_is_no_text_is_refused(tmp_path: Path, column: str, lines: str | bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(DataError, match=message) as caught:
        open_rows(tmp_path, column=column, files=[str(tmp_path / "bad.jsonl")])
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


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
