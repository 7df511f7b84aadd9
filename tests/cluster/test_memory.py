"""What is told of memory that could not be had. Every error here is one that torch, numpy or Python has really raised."""

import pickle
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from distcond.cluster.memory import out_of_memory
from distcond.cluster.policy import LOST
from distcond.cluster.ray_train import _one_line
from distcond.config import Config
from tests.helpers import run_ranks, small_config, train_here


def raised_by(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except (MemoryError, RuntimeError) as error:
        return error
    raise AssertionError("there is memory enough")


def on_a_gpu() -> None:
    """As torch words it; there is no GPU here."""
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of ..."
    )


@pytest.mark.parametrize(
    ("call", "size"),
    [
        (lambda: torch.empty(10**15), "4,000,000,000,000,000 bytes"),
        (lambda: np.empty((10**7, 10**7)), "728. TiB for an array with shape (10000000, 10000000)"),
        (lambda: [None] * 10**17, "an unknown number of bytes"),
        (on_a_gpu, "20.00 GiB"),
    ],
    ids=["torch", "numpy", "python", "cuda"],
)
def test_how_much_was_asked_for_is_told(call: Callable[[], Any], size: str) -> None:
    short = out_of_memory(raised_by(call))
    assert str(short) == f"ran out of memory: {size} asked for in an unknown place"
    assert str(pickle.loads(pickle.dumps(short))) == str(short)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("Cannot allocate memory"), KeyError()]
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert out_of_memory(error) is None


def test_a_worker_that_was_ended_for_want_of_memory_is_told_by_whom() -> None:
    """Ray raises its error where the memory of a node passes RAY_memory_usage_threshold; the kernel's way: test_group.py."""
    failed = WorkerHealthCheckFailedError("A worker health check failed.", failure=OutOfMemoryError("2 worker(s) were killed"))
    assert _one_line(failed, LOST) == "ran out of memory: its node is full, so that Ray ended it"
    failed = WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError())
    assert _one_line(failed, LOST) == LOST


def train_with_little_memory(config: Config, spare_bytes: int) -> str:
    limit = psutil.Process().memory_info().vms + spare_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        train_here(config)
    except (MemoryError, RuntimeError) as error:
        return str(out_of_memory(error))
    return "trained"


@pytest.mark.thorough
def test_a_step_that_memory_cannot_hold_says_where(tmp_path: Path) -> None:
    """The address space of a rank is limited to 500 MB more than it has; a step on 400,000 examples needs some GB."""
    config = small_config(tmp_path, cluster__num_workers=1, data__global_batch_size=400_000)
    [line] = run_ranks(train_with_little_memory, 1, config, 500 * 10**6)
    # Which allocation is the first to fail depends on what the process has freed before: torch's or numpy's, in any file.
    assert re.fullmatch(r"ran out of memory: .* asked for in \w+/\w+\.py:\d+ \(\w+: .*\)", line), line
