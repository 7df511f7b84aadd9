"""Checkpoints on disk: safetensors and JSON, nothing pickled; complete or not there at all.

RUN/checkpoints/step_00001000/  dense.safetensors  tables_00000_of_00002.safetensors  state.json  manifest.json
RUN/checkpoints/latest          the name of the newest complete one

The dense part is full tensors by name, so any world size and ZeRO stage can load it; the tables are train/table_files.py's.
train/checkpoint_writer.py and train/sealing.py write them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distcond.errors import RunError
from distcond.train.sealing import MANIFEST, STATE, fingerprint, newest_name
from distcond.train.table_files import read_tensors

FORMAT_VERSION = 1
DENSE = "dense.safetensors"
ASIDE = "damaged_"
"Of a checkpoint that is not to be read."


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, RunError]]:
    """The newest checkpoint whose files are what its manifest says, and why newer ones are not; None: there was none.

    Raises RunError, naming a file, where there are checkpoints and all of them are damaged.
    """
    named = newest_name(folder)
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


def passed_over(why: RunError, step: int) -> str:
    """What to tell the user of a damaged checkpoint where an older one is intact."""
    return f"{str(why).rpartition(';')[0]}; going on from step {step}, the newest intact checkpoint."


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


def _expect(tensors: Mapping[str, Tensor], key: str, shape: torch.Size, checkpoint: Path) -> Tensor:
    value = tensors.get(key)
    if value is None or value.shape != shape:
        held = "nothing" if value is None else f"shape {tuple(value.shape)}"
        raise RunError(f"{checkpoint} holds {held} for {key}, the model needs {tuple(shape)}; use the run's own config.")
    return value
