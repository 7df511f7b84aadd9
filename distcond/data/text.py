"""Which files a byte corpus is made of, and which of them are held out: `data=stdlib` and `data=text`."""

import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distcond.config import DataConfig, DataName
from distcond.data.corpus import Corpus, Run, Source, in_turn, open_corpus
from distcond.data.parts import FileParts, Part, cut, grouped, line_start, read
from distcond.errors import DataError

NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
"Folders inside the standard library's that are not part of it."
BUILDERS = {"arrow", "csv", "json", "parquet", "text"}
"Values of `data.path` that read local files, `data.files`, rather than name a data set."


class TextFile(NamedTuple):
    """A file of a corpus; size and time stand in for its content, so that an unchanged corpus opens at once."""

    name: str
    "Path relative to the corpus' root, with forward slashes: what the split is made by."
    path: str
    size: int
    mtime_ns: int


def open_stdlib(config: DataConfig, run: Run = in_turn) -> Corpus:
    """The Python sources of the running Python's standard library.

    Raises DataError if it has none.
    """
    root = sysconfig.get_path("stdlib")
    files = sorted(_python_files(root, ""))
    if not files:
        raise DataError(f"This Python has no library sources in {root}; use data=text with files of your own.")
    return _open("stdlib", files, config, run)


def open_text(config: DataConfig, run: Run = in_turn) -> Corpus:
    """The local files that `data.files` names.

    Raises DataError if a pattern matches no file, or all of them are empty.
    """
    return _open("text", local_files(config.files), config, run)


def local_files(patterns: Sequence[str]) -> list[TextFile]:
    """The files that paths and globs name, each once, sorted; names are relative to their nearest common folder.

    Raises DataError if a pattern matches no file.
    """
    paths = sorted({path for pattern in patterns for path in _match(pattern)})
    root = os.path.commonpath([path.parent for path in paths])
    stats = [(path, path.stat()) for path in paths]
    return [TextFile(path.relative_to(root).as_posix(), str(path), s.st_size, s.st_mtime_ns) for path, s in stats]


@dataclass(frozen=True, slots=True)
class Holdout:
    """Which of some names belong to validation: those whose hash falls into the lowest `fraction` of its range.

    A name's fate depends on itself alone, save that of two or more names at least one is held out and one is not.
    """

    fraction: float
    lowest: float
    highest: float
    "Hashes among all names."

    @staticmethod
    def of(names: Iterable[str], fraction: float) -> "Holdout":
        """For these names, at least one."""
        lowest, highest = 1.0, 0.0
        for name in names:
            value = _hash(name)
            lowest, highest = min(lowest, value), max(highest, value)
        return Holdout(fraction, lowest, highest)

    def holds(self, name: str) -> bool:
        """Whether one of the names is held out."""
        value = _hash(name)
        return value == self.lowest or (value < self.fraction and value != self.highest)


def _hash(name: str) -> float:
    """In [0, 1]."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def absolute_paths(config: DataConfig) -> DataConfig:
    """The same configuration for a process that runs in another folder: local paths absolute; hub names and `~` as they are."""
    sources = {source: _absolute_settings(settings) for source, settings in config.sources.items()}
    return dataclasses.replace(
        config,
        sources=sources,
        **_absolute_settings({"name": config.name, "files": config.files, "path": config.path}),
        tokenizer=_absolute(config.tokenizer) if config.tokenizer else "",
        cache_dir=config.cache_dir if config.cache_dir.startswith("~") else _absolute(config.cache_dir),
    )


def _absolute_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one text, with absolute local paths."""
    path, changed = settings.get("path", ""), dict(settings)
    is_local = settings["name"] != DataName.hub or path in BUILDERS
    if "files" in settings:
        changed["files"] = [_absolute_pattern(file) if is_local and "://" not in file else file for file in settings["files"]]
    if is_local_folder(path):
        changed["path"] = _absolute(path)
    return changed


def is_local_folder(path: str) -> bool:
    """Whether `data.path` is a folder here. NOTE: without a slash it is a builder or a name on the hub."""
    return "/" in path and os.path.isdir(os.path.expanduser(path))  # noqa: PTH111, PTH112 - these take any text


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise DataError(f"{path}: nobody here has such a home; write the whole path.") from error


def _absolute_pattern(pattern: str) -> str:
    """The path, if it is there; else a glob in which the current folder, or a home, stands for itself whatever its name."""
    path, own = _absolute(pattern), Path(pattern)
    if own.is_absolute() or os.path.exists(path):  # noqa: PTH110 - takes any text
        return path
    base, rest = (own.parts[0], own.parts[1:]) if pattern.startswith("~") else (".", own.parts)
    return str(Path(glob.escape(_absolute(base)), *rest))


def _match(pattern: str) -> list[Path]:
    path = Path(_absolute(pattern))
    try:
        # NOTE: not Path.glob, which refuses absolute patterns.
        found = [path] if path.exists() else glob.glob(_absolute_pattern(pattern), recursive=True)  # noqa: PTH207
        matches = [Path(match) for match in found]
    except OSError as error:  # too long for a name
        raise DataError(f"data.files: {pattern[:200]!r} cannot be looked for ({error.strerror}); name other files.") from error
    files = [match for match in matches if match.is_file()]
    if not files:
        fault = "matches only folders" if matches else "matches no file"
        example = f"{pattern.rstrip('/')}/**/*.txt" if matches else "corpus/**/*.txt"
        raise DataError(f"data.files: {pattern!r} {fault} (looked for {path}); name files, e.g. data.files=['{example}'].")
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


def _open(source: str, files: list[TextFile], config: DataConfig, run: Run) -> Corpus:
    full = [file for file in files if file.size]
    if not full:
        raise DataError(f"data={source}: all {len(files)} files are empty, e.g. {files[0].path}; name files with text in them.")
    most = config.shard_mib * 2**20

    def plan() -> list[FileParts]:
        by_lines = bool(config.tokenizer)
        parts = (piece for part in _parts(full, config.validation_fraction, by_lines) for piece in cut(part, most, by_lines))
        return [FileParts(tuple(group)) for group in grouped(parts, most)]

    # Python's own sources have some files that are not UTF-8 on purpose, to test itself with.
    errors = "replace" if source == "stdlib" else "strict"
    identity = [config.validation_fraction, most, *full]
    return open_corpus(config.cache_dir, Source(source, identity, plan, config.tokenizer, errors), run)


def _parts(files: list[TextFile], fraction: float, by_lines: bool) -> Iterator[Part]:
    """Whole files to either split; of a lone file, its last `fraction` of bytes to validation."""
    files = list(distinct(files))
    if len(files) == 1:
        (file,) = files
        place = round(file.size * (1 - fraction))
        place = line_start(file.path, place) if by_lines else place
        yield Part("train", file.name, file.path, 0, place, 1)
        yield Part("validation", file.name, file.path, place, file.size, 1)
        return
    holdout = Holdout.of((file.name for file in files), fraction)
    for file in files:
        yield Part("validation" if holdout.holds(file.name) else "train", file.name, file.path, 0, file.size, 1)


def distinct(files: Iterable[TextFile]) -> Iterator[TextFile]:
    """The files less copies of an earlier one: a held-out text must not be trained on under another name.

    Raises DataError if a file cannot be read.
    """
    files = list(files)
    sizes, seen = Counter(file.size for file in files), set()
    for file in files:
        if sizes[file.size] > 1:
            digest = hashlib.sha256()
            for data in read(file.path, 0, file.size):
                digest.update(data)
            if digest.digest() in seen:
                continue
            seen.add(digest.digest())
        yield file
