import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from distcond.cluster.feeder import RayFeeder
from distcond.config import Config
from distcond.data.batches import Batch, LocalFeeder, num_validation_batches
from distcond.errors import DataError
from tests.helpers import small_config, text_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]

RANK, WORLD_SIZE = 1, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return text_config(tmp_path_factory.mktemp("text"), optim__accumulation=2)


@pytest.fixture(scope="module")
def feeder(config: Config) -> Iterator[RayFeeder]:
    feeder = RayFeeder(config, RANK, WORLD_SIZE)
    yield feeder
    feeder.close()


def inside(feeder: RayFeeder, question: Any) -> Any:
    """What a function says in the actor's process."""
    return ray.get(feeder.actor.__ray_call__.remote(lambda actor: question()))


def assert_same(batch: Batch, expected: Batch) -> None:
    for name in ("inputs", "targets", "lengths"):
        got, want = getattr(batch, name), getattr(expected, name)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert batch.global_count == expected.global_count


def test_batches_are_those_of_a_local_feeder_in_any_order(config: Config, feeder: RayFeeder) -> None:
    local = LocalFeeder(config, RANK, WORLD_SIZE)
    in_order = [(step, micro) for step in range(5) for micro in range(2)]
    resumed = [(1000, 1), (1001, 0), (3, 0), (3, 0), (2, 1)]
    for step, micro in in_order + resumed:
        assert_same(feeder.get(step, micro), local.get(step, micro))
    for index in [*range(num_validation_batches(config, WORLD_SIZE)), 0]:
        assert_same(feeder.validation(index), local.validation(index))


def test_a_batch_may_be_written_to(feeder: RayFeeder) -> None:
    feeder.get(0, 0).inputs[:] = 0
    assert feeder.get(0, 0).inputs.any()


def test_the_next_batches_are_computed_before_they_are_asked_for(config: Config) -> None:
    feeder = RayFeeder(config, RANK, WORLD_SIZE, depth=4)
    feeder.get(7, 0)
    ahead = feeder._training._in_flight
    assert list(ahead) == [(7, 1), (8, 0), (8, 1), (9, 0)]
    ready, _ = ray.wait(list(ahead.values()), num_returns=4, timeout=30)
    assert len(ready) == 4
    feeder.close()


def test_the_actor_is_small_and_on_the_node_of_its_worker(feeder: RayFeeder) -> None:
    feeder.get(0, 0)
    modules = inside(feeder, lambda: set(sys.modules))
    assert "numpy" in modules
    assert not modules & {"torch", "deepspeed", "ray.train", "hydra", "omegaconf", "wandb"}
    assert inside(feeder, lambda: ray.get_runtime_context().get_node_id()) == ray.get_runtime_context().get_node_id()


def test_no_batch_is_lost_or_repeated_and_none_takes_5_s_when_the_actor_is_killed(config: Config) -> None:
    local, feeder = LocalFeeder(config, RANK, WORLD_SIZE), RayFeeder(config, RANK, WORLD_SIZE)
    pids, pauses_s = set(), []
    for step in range(15):
        if step % 3 == 1:
            pids.add(pid := inside(feeder, os.getpid))
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.02 * step)  # dead before, or while, the next batch is asked for
        for micro in range(2):
            start = time.monotonic()
            batch = feeder.get(step, micro)
            pauses_s.append(time.monotonic() - start)
            assert_same(batch, local.get(step, micro))
    assert_same(feeder.validation(0), local.validation(0))
    assert len(pids) == 5
    print("pauses", [round(pause, 2) for pause in pauses_s])
    assert max(pauses_s[2:]) < 5  # the first batch waits for the actor to start
    feeder.close()


def test_a_mistake_in_the_data_arrives_as_it_was(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, model__name="transformer", model__heads=2, data__name="text", data__files=[f"{tmp_path}/none.txt"]
    )
    feeder = RayFeeder(config, RANK, WORLD_SIZE)
    with pytest.raises(DataError) as error:
        feeder.get(0, 0)
    assert "none.txt" in str(error.value)
    assert "\n" not in str(error.value)
    feeder.close()


def test_while_there_is_no_actor_the_rank_computes_its_batches_itself(config: Config) -> None:
    local, feeder = LocalFeeder(config, RANK, WORLD_SIZE), RayFeeder(config, RANK, WORLD_SIZE)
    feeder.get(0, 0)
    feeder.close()  # for good: it is not started again
    start = time.monotonic()
    assert_same(feeder.get(7, 1), local.get(7, 1))
    assert_same(feeder.validation(1), local.validation(1))
    assert time.monotonic() - start < 5
