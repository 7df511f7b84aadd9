"""Golden losses: what 20 steps of three small runs gave. Written by `python -m tests.golden.regenerate`.

Run that only for a change that is meant to alter results, and say in its commit why and by how much.
"""

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch

from distcond.config import Config
from tests.helpers import small_config, text_config, train_run

FILE = Path(__file__).with_name("losses.json")
RHYTHM = {"cluster__num_workers": 1, "train__max_steps": 20, "train__eval_every": 20, "checkpoint__every": 20}
NAMES = ("parity", "text", "mlp")


def config_of(name: str, folder: Path) -> Config:
    """parity: tanh cell, ACT, lazy tree. text: a small copy of the default run. mlp: the same text from windows of 8 bytes."""
    if name == "parity":
        return small_config(folder, **RHYTHM)
    shape = {"model__width": 32, "model__heads": 2, "model__feed_forward": 64, "model__tree__depth": 4}
    if name == "mlp":
        shape = {"model__name": "mlp", "model__width": 32, "model__window": 8, "model__tree__depth": 4}
    return text_config(folder, **shape, **RHYTHM, optim__lr=3e-3, data__context=32, optim__warmup_steps=5)


def losses_of(name: str) -> list[float]:
    """`train/loss` of every step, on one rank and one thread."""
    with tempfile.TemporaryDirectory() as folder:
        train_run(config_of(name, Path(folder)))
        rows = (json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines())
        return [row["train/loss"] for row in rows if "train/loss" in row]


def machine() -> dict[str, str]:
    """What rounding depends on: libraries choose their kernels by the instructions and the model of the processor."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    # A virtual machine may call processors of several generations by one name.
    keys = ("vendor_id", "cpu family", "model", "stepping")
    first = dict(line.split("\t", 1) for line in described.partition("\n\n")[0].splitlines() if "\t" in line)
    found = [first[key].strip("\t: ") for key in keys if key in first]
    return {
        "torch": torch.__version__.partition("+")[0],
        "numpy": numpy.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": " ".join(found) or platform.machine(),
    }


def main() -> None:
    """Write the file anew."""
    losses: dict[str, Any] = {name: [loss.hex() for loss in losses_of(name)] for name in NAMES}
    FILE.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=2) + "\n")


if __name__ == "__main__":
    main()
