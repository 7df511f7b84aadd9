"""From bytes to a checkpoint: files are sealed, published and pruned; and the process of a rank that does so beside training.

NOTE: that process runs this file alone, without this package and torch: 0.1 s and 15 MB. It finishes what its rank gave it
even where the rank is killed meanwhile, for it holds the copied state in memory too. Orders and answers are lines of JSON.
"""

import contextlib
import hashlib
import json
import math
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
SEAL = ".seal"
"Of a file that says a rank has written another one, and what it holds."
CANCEL = b"cancel\n"
"Instead of an order: another rank has failed to write its files."
POLL_S = 0.005
BEGIN_S, FINISH_S = 5.0, 60.0
"The longest that files of other ranks are waited for, once the own rank has ended: to be begun, which is at once; to be sealed."
PIECE = 2**20


# ---- files -----------------------------------------------------------------------------------------------------------


def make_folders(folder: Path) -> None:
    """The folder of checkpoints and one in it; no parents, for storage that is gone must not be made where it was mounted."""
    for path in (folder.parent, folder):
        path.mkdir(exist_ok=True)


def write_sealed(folder: Path, name: str, pieces: Iterable[Any]) -> None:
    """Write a file of these bytes-like pieces, push it to the disk and say so beside it. Raises OSError."""
    size, sha256 = 0, hashlib.sha256()
    with (folder / name).open("wb") as file:
        for piece in pieces:
            size += file.write(piece)
            sha256.update(piece)
        file.flush()
        os.fsync(file.fileno())
    _replace_text(folder / f"{name}{SEAL}", json.dumps({"bytes": size, "sha256": sha256.hexdigest()}))


def publish(temporary: Path, final: Path) -> None:
    """Make a folder of sealed files a checkpoint, in one step, and the newest one. Raises OSError."""
    seals = sorted(temporary.glob(f"*{SEAL}"))
    manifest = {seal.name.removesuffix(SEAL): json.loads(seal.read_text()) for seal in seals}
    manifest[STATE] = fingerprint(temporary / STATE)
    for seal in seals:
        seal.unlink()
    _replace_text(temporary / MANIFEST, json.dumps(manifest, indent=2))
    for path in (temporary / STATE, temporary / MANIFEST, temporary):
        sync(path)
    replaced = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _replace_text(final.parent / LATEST, final.name)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(folder: Path, keep_last: int, keep_best: int) -> None:
    """Remove checkpoints that are neither among the newest nor among those with the best figures of validation."""
    newest_first = sorted(folder.glob("step_*"), reverse=True)
    figures = [(_figure(path), path.name) for path in newest_first] if keep_best else []
    best = sorted((value, name) for value, name in figures if value is not None)[:keep_best]
    for path in newest_first[keep_last:]:
        if path.name not in {name for _, name in best}:
            _remove(path)


def _figure(checkpoint: Path) -> float | None:
    """Of the validation at a checkpoint's step, if there was one; a damaged checkpoint has none."""
    try:
        value = float(json.loads((checkpoint / STATE).read_bytes())["validation"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return value if math.isfinite(value) else None


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint such that a part of it is never there."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as a manifest has them."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """Push a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text + "\n")
    sync(temporary)
    temporary.replace(file)


def explained(error: OSError, folder: Path, needs: str) -> str:
    """What went wrong with a checkpoint's folder, with what is needed and what there is."""
    checkpoints = folder.parent
    try:
        free = f"{shutil.disk_usage(checkpoints.parent).free:,} bytes are free"
    except OSError:
        free = f"{checkpoints.parent} is not there"
    return f"{error.strerror or error}; it takes {needs}, {free} in {checkpoints}"


# ---- the process -----------------------------------------------------------------------------------------------------


def _main(memory: int) -> None:
    """memory: descriptor of what the rank copies its state into."""
    if os.fork():
        os._exit(0)  # NOTE: Ray kills the children of workers that it ends; a grandchild it does not know
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with its rank, or a moment later
    orders = os.fdopen(0, "rb", buffering=0)
    while (line := orders.readline()).endswith(b"\n"):
        if line != CANCEL:  # else that of an order that has failed here, too
            start = time.perf_counter()
            error = _carry_out(json.loads(line), memory, orders)
            answer = json.dumps({"error": error, "seconds": time.perf_counter() - start})
            with contextlib.suppress(BrokenPipeError):
                os.write(1, answer.encode() + b"\n")


def _carry_out(order: dict[str, Any], memory: int, orders: BinaryIO) -> str:
    """Write a rank's files, and publish those of all ranks if that is asked for. Returns what went wrong, if anything."""
    folder, publication = Path(order["folder"]), order["publication"]
    try:
        make_folders(folder)
        if publication:
            for left in folder.parent.glob(".step_*"):  # by processes that were killed
                if left != folder:
                    shutil.rmtree(left, ignore_errors=True)
        for name, offset, size in order["files"]:
            write_sealed(folder, name, _pieces(memory, offset, size))
        if publication:
            (folder / STATE).write_text(publication["state"])
            if _may_be_published(folder, publication, orders):
                publish(folder, folder.with_name(publication["name"]))
    except OSError as error:
        return explained(error, folder, order["needs"])
    finally:
        if publication:
            shutil.rmtree(folder, ignore_errors=True)  # where it has not become a checkpoint
    if publication:
        with contextlib.suppress(OSError):  # what is left over is removed the next time
            prune(folder.parent, publication["keep_last"], publication["keep_best"])
    return ""


def _pieces(memory: int, offset: int, size: int) -> Iterator[bytes]:
    for start in range(offset, offset + size, PIECE):
        yield os.pread(memory, min(PIECE, offset + size - start), start)


def _may_be_published(folder: Path, publication: dict[str, Any], orders: BinaryIO) -> bool:
    """Wait until all ranks have written their files; false where that will not be, or where nobody needs them any more.

    The last only once the own rank has ended, and the run, started again, has got as far by itself.
    """
    files, orphaned_s = [folder / name for name in publication["files"]], math.inf
    while True:
        are_sealed = all(file.with_name(f"{file.name}{SEAL}").exists() for file in files)
        if select.select([orders], [], [], 0.0 if are_sealed else POLL_S)[0]:
            if orders.readline():
                return False
            orphaned_s = min(orphaned_s, time.monotonic())
            time.sleep(POLL_S)
        if are_sealed:
            return orphaned_s == math.inf or newest_name(folder.parent) < publication["name"]
        if time.monotonic() > orphaned_s + (FINISH_S if all(file.exists() for file in files) else BEGIN_S):
            return False


def newest_name(checkpoints: Path) -> str:
    """What `latest` says; empty where there is none."""
    pointer = checkpoints / LATEST
    return pointer.read_text(errors="replace").strip() if pointer.is_file() else ""


if __name__ == "__main__":
    _main(int(sys.argv[1]))
