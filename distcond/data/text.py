"""Which files a byte corpus is made of, and which of them are held out: `data=stdlib` and `data=text`."""

import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from distcond.config import DataConfig, DataName
from distcond.data.corpus import Chunk, Corpus, open_corpus
from distcond.errors import DataError

NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
"Folders inside the standard library's that are not part of it."
BUILDERS = {"arrow", "csv", "json", "parquet", "text"}
"Values of `data.path` that read local files, `data.files`, rather than name a data set."
READ_SIZE = 16 * 2**20
"Bytes read at once."


class TextFile(NamedTuple):
    """A file of a corpus; size and time stand in for its content, so that an unchanged corpus opens at once."""

    name: str
    "Path relative to the corpus' root, with forward slashes: what the split is made by."
    path: str
    size: int
    mtime_ns: int


def open_stdlib(config: DataConfig) -> Corpus:
    """The Python sources of the running Python's standard library.

    Raises DataError if it has none.
    """
    root = sysconfig.get_path("stdlib")
    files = sorted(_python_files(root, ""))
    if not files:
        raise DataError(f"This Python has no library sources in {root}; use data=text with files of your own.")
    return _open("stdlib", files, config)


def open_text(config: DataConfig) -> Corpus:
    """The local files that `data.files` names.

    Raises DataError if a pattern matches no file, or all of them are empty.
    """
    return _open("text", local_files(config.files), config)


def local_files(patterns: Sequence[str]) -> list[TextFile]:
    """The files that paths and globs name, each once, sorted; names are relative to their nearest common folder.

    Raises DataError if a pattern matches no file.
    """
    paths = sorted({path for pattern in patterns for path in _match(pattern)})
    root = os.path.commonpath([path.parent for path in paths])
    stats = [(path, path.stat()) for path in paths]
    return [TextFile(path.relative_to(root).as_posix(), str(path), s.st_size, s.st_mtime_ns) for path, s in stats]


def held_out(names: Sequence[str], fraction: float) -> list[bool]:
    """Which of the names belong to validation: those whose hash falls into the lowest `fraction` of its range.

    A name's fate depends on itself alone, save that of two or more names at least one is held out and one is not.
    """
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names]
    lowest, highest = min(hashes), max(hashes)
    return [value == lowest or (value < fraction and value != highest) for value in hashes]


def absolute_paths(config: DataConfig) -> DataConfig:
    """The same configuration for a process that runs in another folder: local paths absolute; hub names and `~` as they are."""
    is_local = config.name != DataName.hf or config.path in BUILDERS
    return dataclasses.replace(
        config,
        files=[_absolute(file) if is_local and "://" not in file else file for file in config.files],
        path=_absolute(config.path) if is_local_folder(config.path) else config.path,
        cache_dir=config.cache_dir if config.cache_dir.startswith("~") else _absolute(config.cache_dir),
    )


def is_local_folder(path: str) -> bool:
    """Whether `data.path` is a folder here. NOTE: without a slash it is a builder or a name on the hub."""
    return "/" in path and Path(path).expanduser().is_dir()


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _match(pattern: str) -> list[Path]:
    path = Path(_absolute(pattern))
    # NOTE: not Path.glob, which refuses absolute patterns.
    matches = [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    files = [match for match in matches if match.is_file()]
    if not files:
        found = "matches only folders" if matches else "matches no file"
        example = f"{pattern.rstrip('/')}/**/*.txt" if matches else "corpus/**/*.txt"
        raise DataError(f"data.files: {pattern!r} {found} (looked for {path}); name files, e.g. data.files=['{example}'].")
    return files


def _python_files(folder: str, prefix: str) -> Iterator[TextFile]:
    # NOTE: os.scandir, not Path.rglob: three times as fast, and this is most of the time that opening a corpus takes.
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in NOT_STDLIB:
                    yield from _python_files(entry.path, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".py") and entry.is_file():
                stat = entry.stat()
                yield TextFile(prefix + entry.name, entry.path, stat.st_size, stat.st_mtime_ns)


def _open(source: str, files: list[TextFile], config: DataConfig) -> Corpus:
    full = [file for file in files if file.size]
    if not full:
        raise DataError(f"data={source}: all {len(files)} files are empty, e.g. {files[0].path}; name files with text in them.")
    fraction = config.validation_fraction
    return open_corpus(config.cache_dir, source, [fraction, *full], lambda: _chunks(full, fraction))


def _chunks(files: list[TextFile], fraction: float) -> Iterator[Chunk]:
    """Whole files to either split; of a lone file, its last `fraction` of bytes to validation."""
    files = list(_distinct(files))
    if len(files) == 1:
        cut = round(files[0].size * (1 - fraction))
        yield from (("train", files[0].name, data) for data in _read(files[0], 0, cut))
        yield from (("validation", files[0].name, data) for data in _read(files[0], cut, files[0].size))
        return
    for file, is_held_out in zip(files, held_out([file.name for file in files], fraction), strict=True):
        split = "validation" if is_held_out else "train"
        yield from ((split, file.name, data) for data in _read(file, 0, file.size))


def _distinct(files: Iterable[TextFile]) -> Iterator[TextFile]:
    """The files less copies of an earlier one: a held-out text must not be trained on under another name."""
    files = list(files)
    sizes, seen = Counter(file.size for file in files), set()
    for file in files:
        if sizes[file.size] > 1:
            digest = hashlib.sha256()
            for data in _read(file, 0, file.size):
                digest.update(data)
            if digest.digest() in seen:
                continue
            seen.add(digest.digest())
        yield file


def _read(file: TextFile, start: int, stop: int) -> Iterator[bytes]:
    try:
        with Path(file.path).open("rb") as stream:
            stream.seek(start)
            while data := stream.read(min(READ_SIZE, stop - stream.tell())):
                yield data
    except OSError as error:
        raise DataError(f"{file.path} cannot be read ({error.strerror}); allow it or leave it out of data.files.") from error
