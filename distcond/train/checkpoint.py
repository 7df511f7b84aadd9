"""Checkpoints on disk: safetensors and JSON, nothing pickled; complete or not there at all.

RUN/checkpoints/step_00001000/  dense.safetensors  tables_00000_of_00002.safetensors  state.json  manifest.json
RUN/checkpoints/latest          the name of the newest complete one

The dense part is full tensors by name, so any world size and ZeRO stage can load it; the tables are train/table_files.py's.
train/checkpoint_writer.py writes them.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from distcond.errors import RunError
from distcond.train.run_folder import write_json
from distcond.train.table_files import read_tensors

FORMAT_VERSION = 1
STATE, MANIFEST, DENSE, LATEST = "state.json", "manifest.json", "dense.safetensors", "latest"
SEAL, ASIDE = ".seal", "damaged_"
"Of a file that says a rank has written another one, and what it holds; of a checkpoint that is not to be read."


# ---- reading ---------------------------------------------------------------------------------------------------------


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, RunError]]:
    """The newest checkpoint whose files are what its manifest says, and why newer ones are not; None: there was none.

    Raises RunError, naming a file, where there are checkpoints and all of them are damaged.
    """
    pointer = folder / LATEST
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    found = sorted((path.name for path in folder.glob("step_*")), reverse=True)
    refused: dict[Path, RunError] = {}
    for name in [name for name in found if name <= named or named not in found]:  # a pointer to nothing is damaged, too
        try:
            return verified(folder / name), refused
        except RunError as error:
            refused[folder / name] = error
    if refused:
        reason = str(next(iter(refused.values()))).rpartition(";")[0]
        raise RunError(f"{reason}, and no other checkpoint is intact; restore one, or use another run.name.")
    return None, refused


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that it counts as none."""
    aside = checkpoint.with_name(f"{ASIDE}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def verified(checkpoint: Path) -> Path:
    """The checkpoint itself, if every file has the size and sha256 of the manifest and no other file is there."""
    manifest_file = checkpoint / MANIFEST
    if not manifest_file.exists():
        raise RunError(f"{checkpoint} is not a checkpoint: {MANIFEST} is missing; choose another step.")
    manifest = _read_object(manifest_file)
    for extra in {file.name for file in checkpoint.iterdir()} - manifest.keys() - {MANIFEST}:
        raise RunError(f"{checkpoint / extra} does not belong to the checkpoint; remove it or choose another step.")
    for name, expected in manifest.items():
        file = checkpoint / name
        if not file.is_file() or fingerprint(file) != expected:
            raise RunError(f"{file} is damaged or missing (its sha256 is not the manifest's); choose another step.")
    return checkpoint


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{file} is damaged (it is no JSON object); choose another step.")
    return value


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says. Raises RunError for a format this version does not read."""
    state = _read_object(checkpoint / STATE)
    if state.get("format_version") != FORMAT_VERSION:
        raise RunError(f"{checkpoint} has format {state.get('format_version')}; this version reads {FORMAT_VERSION}.")
    return state


def read_dense(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    """The dense tensors; the model's buffers are set from the same file. Raises RunError where names or shapes differ."""
    tensors = read_tensors(checkpoint / DENSE)
    for name, buffer in model.named_buffers():
        buffer.copy_(_expect(tensors, f"buffers/{name}", buffer.shape, checkpoint))
    for name, parameter in model.named_parameters():
        _expect(tensors, f"{name}/weight", parameter.shape, checkpoint)
    return {key: value for key, value in tensors.items() if not key.startswith("buffers/")}


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_sealed(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, push it to the disk and say so beside it. Raises OSError."""
    try:
        save_file(tensors, folder / name)
    except SafetensorError as error:  # e.g. "... I/O error: No space left on device (os error 28)"
        raise OSError(str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]) from error
    sync(folder / name)
    write_json(folder / f"{name}{SEAL}", fingerprint(folder / name))


def publish(temporary: Path, final: Path) -> None:
    """Make a folder of sealed files a checkpoint, in one step, and the newest one. Raises OSError."""
    seals = sorted(temporary.glob(f"*{SEAL}"))
    manifest = {seal.name.removesuffix(SEAL): json.loads(seal.read_text()) for seal in seals}
    manifest[STATE] = fingerprint(temporary / STATE)
    for seal in seals:
        seal.unlink()
    write_json(temporary / MANIFEST, manifest)
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
        value = read_state(checkpoint).get("validation")
    except (OSError, ValueError, RunError):
        return None
    return float(value) if value is not None and math.isfinite(value) else None


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


def _expect(tensors: Mapping[str, Tensor], key: str, shape: torch.Size, checkpoint: Path) -> Tensor:
    value = tensors.get(key)
    if value is None or value.shape != shape:
        held = "nothing" if value is None else f"shape {tuple(value.shape)}"
        raise RunError(f"{checkpoint} holds {held} for {key}, the model needs {tuple(shape)}; use the run's own config.")
    return value
