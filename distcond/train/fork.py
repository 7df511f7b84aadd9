"""A new run that starts from the newest checkpoint of another one (`run.fork=true`)."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distcond.config import Config
from distcond.errors import RunError
from distcond.nn.budget import StepBudget
from distcond.train.checkpoint import newest_checkpoint, passed_over, read_state
from distcond.train.run_folder import RunFolder, check_forks, write_json
from distcond.train.sealing import LATEST, MANIFEST, STATE, fingerprint


def fork_run(config: Config, note: Callable[[str], None]) -> tuple[Config, int]:
    """Copy the newest intact checkpoint of config.run.name into the folder of a new run.

    Returns the new run's configuration, with its own name, and the step that it starts from. Nothing is shared with the
    old run, so damage to one spares the other. note: told of newer checkpoints that are damaged. Raises as find_start.
    """
    parent, (checkpoint, state) = RunFolder.of(config), find_start(config, note)
    step, folder, target = state["step"], _new_folder(parent.path), config.model.halting.target_steps
    # The old run's figures, and what it had learnt of a budget it may not have had, were reached with other settings.
    state |= {"summary": {"forked_from": {"run": parent.path.name, "step": step}}, "validation": None}
    state["budget"] = state["budget"] or (target and StepBudget(target).state_dict())
    _copy(checkpoint, folder.checkpoints, state)
    return replace(config, run=replace(config.run, name=folder.path.name, fork=False)), step


def find_start(config: Config, note: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint of config.run.name, which a fork of it starts from, and its state.

    note: told of newer checkpoints that are damaged. Raises RunError where the old run is still being written, and where
    there is nothing to start from or nothing to do.
    """
    parent = RunFolder.of(config)
    check_forks(parent)
    if parent.is_held():
        raise RunError(f"run.fork=true: {parent.path} is still being written; wait for that run to end, or stop it.")
    checkpoint, damaged = newest_checkpoint(parent.checkpoints)
    if checkpoint is None:
        raise RunError(f"run.fork=true: {parent.path} has no checkpoint to start from; train it to its first one.")
    state = read_state(checkpoint)
    step = state["step"]
    if step >= config.train.max_steps:
        raise RunError(
            f"run.fork=true: {checkpoint} is already at step {step} of train.max_steps={config.train.max_steps}; "
            f"raise train.max_steps."
        )
    for why in damaged.values():
        note(passed_over(why, step))
    return checkpoint, state


def _new_folder(parent: Path) -> RunFolder:
    """`<parent>-fork`, or with the first number that is free."""
    number = 1
    while True:
        path = parent.with_name(f"{parent.name}-fork{number if number > 1 else ''}")
        try:
            path.mkdir()
            return RunFolder(path)
        except FileExistsError:
            number += 1


def _copy(checkpoint: Path, folder: Path, state: dict[str, Any]) -> None:
    """A copy, complete or absent, with another state."""
    copy, temporary = folder / checkpoint.name, folder / f".{checkpoint.name}.tmp"
    shutil.copytree(checkpoint, temporary)
    write_json(temporary / STATE, state)
    manifest = json.loads((temporary / MANIFEST).read_text())
    write_json(temporary / MANIFEST, {**manifest, STATE: fingerprint(temporary / STATE)})
    temporary.rename(copy)
    (folder / LATEST).write_text(f"{copy.name}\n")
