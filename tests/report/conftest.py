"""A run that grew out of another one, and what an evaluation may say of it."""

from pathlib import Path
from typing import Any

import pytest

from distcond.compose import save_config
from distcond.config import Config
from tests.helpers import changed, train_run

EVALUATION: dict[str, Any] = {
    "val/bpb": 2.0,
    "val/bpb/low": 1.9,
    "val/bpb/high": 2.1,
    "val/ponder/steps": 2.5,
    "val/ponder/steps_p50": 2,
    "val/ponder/steps_p95": 4,
    "val/ponder/steps_histogram": [0.25, 0.25, 0.25, 0.25],
    "latency_ms/batch_1/p50": 3.0,
    "control/fixed_steps": {"1": 3.0, "2": 1.9, "3": 2.5},
    "control/steps_loss_rank_correlation": 0.5,
    "against": {"run": "other", "step": 9, "val/bpb": 2.5, "val/ponder/steps": 1.0, "latency_ms/batch_1/p50": 1.5},
    "against/difference": -0.5,
    "against/difference/low": -0.75,
    "against/difference/high": -0.25,
}
"Made up."
CHANCE = {
    f"control/steps_loss_{way}_{end}": value
    for way, ends in {"shuffled": (-0.1, 0.1, 0.005), "at_equal_positions": (0.3, 0.6, 0.25)}.items()
    for end, value in zip(("low", "high", "p"), ends, strict=True)
}


def path_of(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


@pytest.fixture(scope="session", name="family")
def make_family(text_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs: `dense`, and `grown`, the same with a tree, which started from it."""
    folder = tmp_path_factory.mktemp("family")
    own = {"run__dir": str(folder), "cluster__num_workers": 1, "train__profile": False, "train__log_every": 1}
    dense = changed(text_run, **own, run__name="dense", model__tree__depth=0, train__max_steps=4, train__eval_every=2)
    start = {"train__init_from": str(folder / "dense"), "train__max_steps": 3}
    for config in (dense, changed(dense, run__name="grown", model__tree__depth=3, **start)):
        train_run(config)
        save_config(config, path_of(config) / "config.yaml")
    return folder
