"""The store of prepared corpora."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distcond.data.corpus import Corpus, Run, Source, in_turn, open_corpus, verify
from distcond.data.shard import Chunk, Item, Shard
from distcond.errors import DataError
from tests.helpers import HANG_S

CHUNKS = [
    Chunk("train", "a", b"one ", 1),
    Chunk("validation", "b", b"two ", 1),
    Chunk("train", "a", b"three "),
    Chunk("train", "", b"four", 2),
]


@dataclass(frozen=True)
class Given:
    """An item of these chunks."""

    given: tuple[Chunk, ...]

    def chunks(self) -> Iterator[Chunk]:
        yield from self.given


@dataclass(frozen=True)
class Calling:
    """An item whose chunks come from a function."""

    function: Callable[[], Iterator[Chunk]]

    def chunks(self) -> Iterator[Chunk]:
        return self.function()


def items() -> list[Item]:
    return [Given(tuple(CHUNKS))]


def single() -> list[Item]:
    return [Given((chunk,)) for chunk in CHUNKS]


def refuse() -> list[Item]:
    raise AssertionError("prepared again")


def opened(
    folder: Path, plan: Callable[[], list[Item]] = items, identity: Any = 1, name: str = "text", run: Run = in_turn
) -> Corpus:
    return open_corpus(str(folder), Source(name, identity, plan), run)


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("plan", [items, single])
def test_splits_are_the_chunks_in_order_and_the_manifest_describes_them(tmp_path: Path, plan: Callable[[], list[Item]]) -> None:
    corpus = opened(tmp_path, plan)
    assert corpus.train.tobytes() == b"one three four" and corpus.validation.tobytes() == b"two "
    assert len(corpus.train) == 14 and len(corpus.validation) == 4
    for split, files, documents in [("train", ["a"], 3), ("validation", ["b"], 1)]:
        size = len(getattr(corpus, split))
        described = {key: value for key, value in corpus.manifest[split].items() if key != "sha256"}
        assert described == {"bytes": size, "tokens": size, "documents": documents, "files": files}


def test_of_one_shard_the_sha256_is_that_of_the_text_and_of_more_that_of_theirs(tmp_path: Path) -> None:
    def sha256(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    one, many = opened(tmp_path / "one"), opened(tmp_path / "many", single)
    assert one.manifest["train"]["sha256"] == sha256(one.train.tobytes())
    parts = [b"one ", b"", b"three ", b"four"]
    assert [shard["train"]["sha256"] for shard in many.manifest["shards"]] == [sha256(part) for part in parts]
    assert many.manifest["train"]["sha256"] == sha256("\n".join(map(sha256, parts)).encode())


def test_what_is_prepared_is_not_prepared_again(tmp_path: Path) -> None:
    first = opened(tmp_path, identity={"size": 1})
    again = opened(tmp_path, refuse, {"size": 1})
    assert again.train.tobytes() == first.train.tobytes() and again.manifest == first.manifest


def test_another_identity_or_source_is_prepared(tmp_path: Path) -> None:
    opened(tmp_path, identity={"size": 1})
    for source, identity in [("text", {"size": 2}), ("hub", {"size": 1})]:
        with pytest.raises(AssertionError, match="prepared again"):
            opened(tmp_path, refuse, identity, source)


def test_the_order_in_which_shards_are_written_leaves_no_trace(tmp_path: Path) -> None:
    def backwards(shards: Sequence[Shard]) -> Iterator[int]:
        return in_turn(shards[::-1])

    opened(tmp_path / "one", single)
    opened(tmp_path / "other", single, run=backwards)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    for file in contents(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_what_an_interrupted_preparation_has_written_is_kept(tmp_path: Path) -> None:
    """A shard of another size than its record's is not whole: a disk was full, or power went."""
    numbers: list[int] = []

    def interrupted(shards: Sequence[Shard]) -> Iterator[int]:
        yield from in_turn(shards[:3])
        raise KeyboardInterrupt

    def counted(shards: Sequence[Shard]) -> Iterator[int]:
        numbers.extend(shard.number for shard in shards)
        return in_turn(shards)

    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, single, run=interrupted)
    (folder,) = (tmp_path / "corpora").iterdir()
    (folder / "00001" / "validation.bin").write_bytes(b"tw")
    (folder / ".00003.killed" / "shard").mkdir(parents=True)
    assert opened(tmp_path, single, run=counted).train.tobytes() == b"one three four"
    assert numbers == [1, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002", "00003", "manifest.json"]


def test_an_empty_split_opens(tmp_path: Path) -> None:
    corpus = opened(tmp_path, lambda: [Given((Chunk("train", "a", b"one"),))])
    assert corpus.validation.tobytes() == b""


def test_many_may_prepare_at_once(tmp_path: Path) -> None:
    """All of them are in the middle of writing before the first one finishes."""
    everyone = threading.Barrier(6, timeout=HANG_S)

    def together() -> Iterator[Chunk]:
        yield CHUNKS[0]
        everyone.wait()
        yield from CHUNKS[1:]

    with ThreadPoolExecutor(6) as pool:
        corpora = list(pool.map(lambda _: opened(tmp_path, lambda: [Calling(together)]), range(6)))
    assert {corpus.train.tobytes() for corpus in corpora} == {b"one three four"}
    assert [Path(name).name for name in contents(tmp_path)] == ["shard.json", "train.bin", "validation.bin", "manifest.json"]


def test_a_failed_preparation_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing() -> Iterator[Chunk]:
        yield CHUNKS[0]
        raise DataError("unreadable")

    with pytest.raises(DataError, match="unreadable"):
        opened(tmp_path, lambda: [*items(), Calling(failing)])
    assert list((tmp_path / "corpora").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "named"), [("00002/train.bin", r".*\(00002/train\.bin has 4 bytes, not 6\)"), ("manifest.json", "")]
)
def test_a_damaged_corpus_is_named(tmp_path: Path, damage: str, named: str) -> None:
    file = opened(tmp_path, single).folder / damage
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"corpora/\w+ is damaged {named}") as caught:
        opened(tmp_path, refuse)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    file = opened(tmp_path, single).folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["train"]["documents"] += 1
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="its 4 shards have 3 train documents, its manifest says 4"):
        opened(tmp_path, refuse)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    shutil.rmtree(opened(tmp_path, single).folder / "00001")
    with pytest.raises(DataError, match=r"00001/train\.bin"):
        opened(tmp_path, refuse)


def test_a_shard_whose_bytes_have_changed_is_found_by_reading_it(tmp_path: Path) -> None:
    corpus = opened(tmp_path, single)
    verify(corpus)
    (corpus.folder / "00002" / "train.bin").write_bytes(b"THREE ")
    with pytest.raises(DataError, match=r"the sha256 of 00002/train\.bin is not the manifest's"):
        verify(opened(tmp_path, refuse))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        opened(tmp_path / "file")
