"""What a new run starts from (`train.init_from`), found and judged where the command was typed, before Ray starts."""

from collections.abc import Sequence
from pathlib import Path

from distcond.compose import load_config
from distcond.config import Config
from distcond.train.run_folder import RunFolder

# NOTE: torch, which reads checkpoints, takes 2 s to import; it is imported where a run starts from another one.


def check_start(configs: Sequence[Config]) -> str:
    """Judge whether named runs with one train.init_from can start from that run; returns a line on it for the user.

    Empty: none of them has to, for all have a checkpoint of their own, or train.init_from is empty. Raises RunError.
    """
    fresh = [config for config in configs if config.train.init_from and not _has_begun(config)]
    if not fresh:
        return ""
    from distcond.train.grow import becomes, changes_function, check_suits, deepens, source_of

    parent = RunFolder(Path(fresh[0].train.init_from))
    checkpoint, step = source_of(parent)
    old = load_config(parent.config_file)
    for config in fresh:
        check_suits(old, config, checkpoint)
    grown = becomes(old, fresh[0])
    parts = [f"init  {parent.path} at step {step}"]
    if grown:
        parts.append(f"new trees of depth {fresh[0].model.tree.depth}: {', '.join(grown)}")
    if deeper := deepens(old, fresh[0]):
        parts.append(f"trees of depth {old.model.tree.depth} become {fresh[0].model.tree.depth} deep: {', '.join(deeper)}")
    if changes_function(old, fresh[0]):
        parts.append(f"it halts otherwise ({fresh[0].model.halting.kind}, was {old.model.halting.kind}), so figures will differ")
    return "; ".join(parts)


def _has_begun(config: Config) -> bool:
    folder = RunFolder.of(config)
    return bool(config.run.name) and any(folder.checkpoints.glob("step_*"))
