"""A trained run opened for reading: configuration, data, and the model of a checkpoint, whole, in this process."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distcond.compose import load_config
from distcond.config import Config
from distcond.data.batches import LocalFeeder
from distcond.errors import ConfigError, RunError
from distcond.nn.model import Learner
from distcond.ops import use_kernels
from distcond.train.checkpoint import newest_checkpoint, read_dense, read_state, verified
from distcond.train.learner import learner_for
from distcond.train.run_folder import RunFolder
from distcond.train.table_files import load_tables

log = logging.getLogger(__name__)

MAY_DIFFER = frozenset({"cache_dir", "shard_mib", "global_batch_size"})
"Keys of `data` that the validation set does not depend on."


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """What is read of a run."""

    folder: RunFolder
    config: Config
    checkpoint: Path
    step: int
    "Updates that the checkpoint has seen."
    feeder: LocalFeeder
    "Batches of the run's data, as one rank sees them."
    learner: Learner
    "In evaluation mode."


def run_folder(run: Path) -> RunFolder:
    """The folder of a run. Raises RunError where there is none."""
    folder = RunFolder(run)
    if not folder.config_file.is_file():
        raise RunError(f"{run} is not a run folder, for it has no config.yaml; give one such as runs/first.")
    return folder


def open_run(run: Path, step: int | None = None) -> OpenedRun:
    """Read a run and the model of a checkpoint, with the kernels of the run; run, step, errors: as of `find_checkpoint`."""
    return open_checkpoint(*find_checkpoint(run, step))


def open_checkpoint(folder: RunFolder, config: Config, checkpoint: Path) -> OpenedRun:
    """Read the model of what `find_checkpoint` has found, with the kernels of the run."""
    feeder = LocalFeeder(config, rank=0, world_size=1)
    _choose_kernels(config)
    return OpenedRun(folder, config, checkpoint, read_state(checkpoint)["step"], feeder, _learner(checkpoint, config, feeder))


def find_checkpoint(run: Path, step: int | None = None) -> tuple[RunFolder, Config, Path]:
    """A run's folder and configuration, and a checkpoint of it that is intact.

    step: which checkpoint; None: the newest intact one, once the run is over. Raises RunError where there is no run, where it
    goes on, and where there is no such checkpoint, or none that is intact.
    """
    folder = run_folder(run)
    if step is None and folder.is_held():
        raise RunError(f"{run} is still being written; wait for the run to end, or choose a checkpoint of it by --step N.")
    return folder, load_config(folder.config_file), _checkpoint(folder, step)


def data_differences(own: Config, other: Config) -> list[str]:
    """Keys of `data` that make the validation sets of two runs different ones."""
    values, others = asdict(own.data), asdict(other.data)
    return [key for key in values if values[key] != others[key] and key not in MAY_DIFFER]


@contextmanager
def threads(most: int) -> Iterator[None]:
    """Compute with so many threads meanwhile, at most those that there are.

    NOTE: two threads of which other processes take a processor wait for each other: one example of the default model then
    takes 260 ms, with one thread 8 ms.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose_kernels(config: Config) -> None:
    """Those of the run, or torch's where this machine cannot compile them: figures are the same then, latency is not."""
    try:
        use_kernels(config.cluster.kernels.value)
    except ConfigError:
        use_kernels("torch")


def _learner(checkpoint: Path, config: Config, feeder: LocalFeeder) -> Learner:
    learner = learner_for(config, feeder.task)
    dense = read_dense(checkpoint, learner)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.copy_(dense[f"{name}/weight"])
    load_tables(checkpoint, learner)
    return learner.eval()


def _checkpoint(folder: RunFolder, step: int | None) -> Path:
    if step is not None:
        chosen = folder.checkpoints / f"step_{step:08d}"
        if chosen.is_dir():
            return verified(chosen)
        held = ", ".join(str(int(path.name[5:])) for path in sorted(folder.checkpoints.glob("step_*"))) or "none"
        raise RunError(f"{folder.path} has no checkpoint of step {step}; it has: {held}.")
    newest, damaged = newest_checkpoint(folder.checkpoints)
    for reason in damaged.values():
        log.warning("%s; reading %s, the newest that is intact.", str(reason).rpartition(";")[0], newest and newest.name)
    if newest is None:
        again = f"distcond train --config {shlex.quote(str(folder.config_file))}"
        raise RunError(f"{folder.path} has no checkpoint yet; train it first: {again}")
    return newest
