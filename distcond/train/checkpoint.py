"""Checkpoints: safetensors and JSON, nothing pickled; written aside, then moved into place in one step.

RUN/checkpoints/step_00001000/  dense.safetensors  tables_00000_of_00002.safetensors  state.json  manifest.json
RUN/checkpoints/latest          the name of the newest complete one

The dense part is full tensors by name, so any world size and ZeRO stage can load it; the tables are train/table_files.py's.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distcond.errors import RunError
from distcond.optim.sharded import ShardedRows
from distcond.table import Collective
from distcond.train.run_folder import write_json
from distcond.train.table_files import write_tables

FORMAT_VERSION = 1
STATE, MANIFEST, DENSE, LATEST = "state.json", "manifest.json", "dense.safetensors", "latest"


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    dense: Mapping[str, Tensor],
    model: nn.Module,
    tables: ShardedRows,
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write the state after `step` updates; every rank calls this. dense: the engine's full tensors."""
    world = tables.world
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier(world)
    write_tables(temporary, model, tables)
    if world.rank == 0:
        buffers = {f"buffers/{name}": value.detach().cpu().clone() for name, value in model.named_buffers()}
        save_file({**{key: value.contiguous() for key, value in dense.items()}, **buffers}, temporary / DENSE)
        write_json(temporary / STATE, {"format_version": FORMAT_VERSION, "step": step, **state})
        _seal(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _replace_text(folder / LATEST, final.name)
        for old in sorted(folder.glob("step_*"))[:-keep_last]:
            shutil.rmtree(old)
    _barrier(world)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, verified against its manifest. Raises RunError naming a damaged file."""
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    return verified(folder / pointer.read_text().strip())


def verified(checkpoint: Path) -> Path:
    """The checkpoint itself, if every file has the size and sha256 of the manifest and no other file is there."""
    manifest_file = checkpoint / MANIFEST
    if not manifest_file.exists():
        raise RunError(f"{checkpoint} is not a checkpoint: {MANIFEST} is missing; choose another step.")
    manifest: dict[str, dict[str, Any]] = json.loads(manifest_file.read_text())
    for extra in {file.name for file in checkpoint.iterdir()} - manifest.keys() - {MANIFEST}:
        raise RunError(f"{checkpoint / extra} does not belong to the checkpoint; remove it or choose another step.")
    for name, expected in manifest.items():
        file = checkpoint / name
        if not file.exists() or file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise RunError(f"{file} is damaged or missing (its sha256 is not the manifest's); choose another step.")
    return checkpoint


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says. Raises RunError for a format this version does not read."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    if state.get("format_version") != FORMAT_VERSION:
        raise RunError(f"{checkpoint} has format {state.get('format_version')}; this version reads {FORMAT_VERSION}.")
    return state


def read_dense(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    """The dense tensors; the model's buffers are set from the same file. Raises RunError where names or shapes differ."""
    tensors = load_file(checkpoint / DENSE)
    for name, buffer in model.named_buffers():
        buffer.copy_(_expect(tensors, f"buffers/{name}", buffer.shape, checkpoint))
    for name, parameter in model.named_parameters():
        _expect(tensors, f"{name}/weight", parameter.shape, checkpoint)
    return {key: value for key, value in tensors.items() if not key.startswith("buffers/")}


def _seal(checkpoint: Path) -> None:
    """Write the manifest and push everything to the disk."""
    files = sorted(checkpoint.iterdir())
    write_json(checkpoint / MANIFEST, {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files})
    for path in (*checkpoint.iterdir(), checkpoint):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text + "\n")
    temporary.replace(file)


def _expect(tensors: Mapping[str, Tensor], key: str, shape: torch.Size, checkpoint: Path) -> Tensor:
    value = tensors.get(key)
    if value is None or value.shape != shape:
        held = "nothing" if value is None else f"shape {tuple(value.shape)}"
        raise RunError(f"{checkpoint} holds {held} for {key}, the model needs {tuple(shape)}; use the run's own config.")
    return value


def _barrier(world: Collective) -> None:
    world.sum_(torch.zeros(1))
