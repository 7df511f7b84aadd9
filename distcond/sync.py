"""`distcond sync`: sends to wandb what has not been sent of runs that were offline, or whose server went away."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from distcond.compose import load_config, to_dict
from distcond.config import TrackingMode
from distcond.errors import ConfigError, RunError
from distcond.tracking import NoKeyError, has_unsent, send, wandb_run
from distcond.train.run_folder import RunFolder


def sync(named: Sequence[Path], run_dir: Path) -> Iterator[str]:
    """Send what has not been sent of the named runs, or of every run below `run_dir` that tracks; yields a line for each.

    A folder that is no run stands for the runs below it, e.g. a sweep's. Raises RunError where a folder holds no run,
    ConfigError where there is no key, and SendError at the first run that cannot be sent.
    """
    num_sent = 0
    folders = [folder for path in named or [run_dir] for folder in _runs(path)]
    for folder in folders:
        config, is_growing = load_config(folder.config_file), folder.is_held()
        if not named and config.tracking.mode == TrackingMode.disabled:
            continue
        if not has_unsent(folder.path, is_growing=is_growing):
            continue
        run = wandb_run(folder.path, config.tracking, to_dict(config))
        try:
            count = send(folder.path, run, is_growing=is_growing)
        except NoKeyError as error:
            raise ConfigError(str(error)) from error
        num_sent += 1
        yield f"{folder.path}: is being sent already" if count is None else f"{folder.path}: {count} rows sent to {run.id}"
    if not num_sent:
        yield f"nothing to send of {len(folders)} run{'s' * (len(folders) != 1)}"


def _runs(path: Path) -> list[RunFolder]:
    """The run in a folder, or those below it. Raises RunError where there is none."""
    files = [path / "config.yaml"] if (path / "config.yaml").is_file() else sorted(path.glob("*/**/config.yaml"))
    folders = [RunFolder(file.parent) for file in files if (file.parent / "metrics.jsonl").is_file()]
    if not folders:
        raise RunError(f"{path} holds no run with metrics; give the folder of a run, or run.dir=FOLDER for all runs in it.")
    return folders
