"""What every task can do."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distcond.config import DataConfig, DataName
from distcond.data import Task, build_task

SHAPES = {
    DataName.stdlib: ("bytes", 256, 256, 32),
    DataName.text: ("bytes", 256, 256, 32),
    DataName.hub: ("bytes", 256, 256, 32),
    DataName.mixture: ("bytes", 256, 256, 32),
    DataName.parity: ("vectors", 64, 1, 1),
    DataName.logic: ("vectors", 102, 1, 10),
    DataName.addition: ("vectors", 50, 66, 10),
    DataName.sort: ("vectors", 2, 10, 20),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "a.txt").write_text("a line of text\n" * 100)
    return folder


def task_of(name: DataName, folder: Path) -> Task:
    files = [] if name == DataName.stdlib else [str(folder / "a.txt")]
    sources = {"a": {"name": "text", "weight": 1}, "b": {"name": "stdlib", "weight": 2}} if name == DataName.mixture else {}
    cache = str(folder / "cache")
    return build_task(DataConfig(name=name, files=files, path="text", sources=sources, context=32, cache_dir=cache))


@pytest.mark.parametrize("name", DataName)
def test_a_batch_has_the_announced_shape(name: DataName, folder: Path) -> None:
    task = task_of(name, folder)
    assert (task.kind, task.input_size, task.output_size, task.max_length) == SHAPES[name]
    kind, inputs, outputs, length = SHAPES[name]
    for batch in (task.rows(0, 0, 6), task.validation_rows(2, 6)):
        assert batch.inputs.shape == ((6, length) if kind == "bytes" else (6, length, inputs))
        assert batch.targets.shape == ((6, length) if kind == "bytes" else (6, length, outputs // task.num_classes))
        assert batch.inputs.dtype == (np.uint8 if kind == "bytes" else np.float32)
        classes = np.uint8 if kind == "bytes" else np.int64
        assert batch.targets.dtype == (classes if task.num_classes > 1 else np.float32)
        assert batch.lengths.dtype == np.int64 and batch.lengths.min() >= 1 and batch.lengths.max() <= length
        assert batch.global_count == (6 * length if kind == "bytes" else 6)
        assert all(array.flags.c_contiguous and array.flags.writeable for array in (batch.inputs, batch.targets))


@pytest.mark.parametrize("name", DataName)
def test_the_fingerprint_is_json_and_lasts(name: DataName, folder: Path) -> None:
    fingerprint = task_of(name, folder).fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint == task_of(name, folder).fingerprint()
    assert fingerprint["name"] == name


def test_the_fingerprint_tells_data_apart() -> None:
    configs = [DataConfig(name="parity"), DataConfig(name="parity", num_bits=8), DataConfig(name="logic", max_gates=2)]
    configs += [DataConfig(name="addition"), DataConfig(name="addition", max_digits=3), DataConfig(name="sort")]
    assert len({json.dumps(build_task(config).fingerprint()) for config in configs}) == len(configs)


def test_data_actors_stay_small() -> None:
    heavy = ["torch", "ray", "deepspeed", "wandb", "datasets", "hydra"]
    command = f"import sys, distcond.data; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", command], text=True).strip() == "[]"
