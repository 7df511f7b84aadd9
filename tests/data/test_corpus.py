"""The store of prepared corpora."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distcond.data.corpus import Chunk, open_corpus
from distcond.errors import DataError

CHUNKS = [("train", "a", b"one "), ("validation", "b", b"two "), ("train", "a", b"three "), ("train", "", b"four")]


def chunks() -> Iterator[Chunk]:
    yield from CHUNKS


def refuse() -> Iterator[Chunk]:
    raise AssertionError("prepared again")


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_splits_are_the_chunks_in_order_and_the_manifest_describes_them(tmp_path: Path) -> None:
    corpus = open_corpus(str(tmp_path), "text", 1, chunks)
    assert corpus.train.tobytes() == b"one three four" and corpus.validation.tobytes() == b"two "
    for split, files in [("train", ["a"]), ("validation", ["b"])]:
        data = getattr(corpus, split).tobytes()
        described = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "files": files}
        assert corpus.manifest[split] == described


def test_what_is_prepared_is_not_prepared_again(tmp_path: Path) -> None:
    first = open_corpus(str(tmp_path), "text", {"size": 1}, chunks)
    again = open_corpus(str(tmp_path), "text", {"size": 1}, refuse)
    assert again.train.tobytes() == first.train.tobytes() and again.manifest == first.manifest


def test_another_identity_or_source_is_prepared(tmp_path: Path) -> None:
    open_corpus(str(tmp_path), "text", {"size": 1}, chunks)
    for source, identity in [("text", {"size": 2}), ("hf", {"size": 1})]:
        with pytest.raises(AssertionError, match="prepared again"):
            open_corpus(str(tmp_path), source, identity, refuse)


def test_an_empty_split_opens(tmp_path: Path) -> None:
    corpus = open_corpus(str(tmp_path), "text", 1, lambda: [("train", "a", b"one")])
    assert corpus.validation.tobytes() == b""


def test_many_may_prepare_at_once(tmp_path: Path) -> None:
    """All of them are in the middle of writing before the first one finishes."""
    everyone = threading.Barrier(6, timeout=20)

    def together() -> Iterator[Chunk]:
        yield CHUNKS[0]
        everyone.wait()
        yield from CHUNKS[1:]

    with ThreadPoolExecutor(6) as pool:
        corpora = list(pool.map(lambda _: open_corpus(str(tmp_path), "text", 1, together), range(6)))
    assert {corpus.train.tobytes() for corpus in corpora} == {b"one three four"}
    assert [Path(name).name for name in contents(tmp_path)] == ["manifest.json", "train.bin", "validation.bin"]


def test_a_failed_preparation_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing() -> Iterator[Chunk]:
        yield CHUNKS[0]
        raise DataError("unreadable")

    with pytest.raises(DataError, match="unreadable"):
        open_corpus(str(tmp_path), "text", 1, failing)
    assert list((tmp_path / "corpora").iterdir()) == []


@pytest.mark.parametrize("damage", ["train.bin", "manifest.json"])
def test_a_damaged_corpus_is_named(tmp_path: Path, damage: str) -> None:
    open_corpus(str(tmp_path), "text", 1, chunks)
    (file,) = tmp_path.rglob(damage)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=str(file.parent)) as caught:
        open_corpus(str(tmp_path), "text", 1, refuse)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        open_corpus(str(tmp_path / "file"), "text", 1, chunks)
