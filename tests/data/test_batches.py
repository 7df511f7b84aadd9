"""Which rows of which batch a rank sees."""

from pathlib import Path

import numpy as np
import pytest

from distcond.config import ClusterConfig, Config, DataConfig, ModelConfig, ModelName, OptimConfig
from distcond.data import Batch, LocalFeeder, build_task, num_validation_batches
from tests.pairs import every_pair

ACCUMULATIONS = [1, 2]
WORLD_SIZES = [1, 2, 4]
NAMES = ["parity", "logic", "text"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes())
    return str(tmp_path / "text")


def config_of(name: str, text: str, world_size: int = 1, accumulation: int = 1, examples: int = 10) -> Config:
    data = DataConfig(
        name=name,
        files=[text],
        cache_dir=f"{text}-cache",
        global_batch_size=16,
        context=20,
        validation_examples=examples,
    )
    return Config(
        seed=3,
        model=ModelConfig(name=ModelName.transformer if name == "text" else ModelName.rnn),
        data=data,
        optim=OptimConfig(accumulation=accumulation),
        cluster=ClusterConfig(num_workers=world_size),
    )


def assert_equal(one: Batch, other: Batch) -> None:
    assert np.array_equal(one.inputs, other.inputs)
    assert np.array_equal(one.targets, other.targets)
    assert np.array_equal(one.lengths, other.lengths)
    assert one.global_count == other.global_count


def concatenate(batches: list[Batch]) -> Batch:
    parts = [[getattr(batch, name) for batch in batches] for name in ("inputs", "targets", "lengths")]
    return Batch(*(np.concatenate(part) for part in parts), batches[0].global_count)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_slices_of_all_ranks_are_the_whole_batch(name: str, accumulation: int, world_size: int, text: str) -> None:
    config = config_of(name, text, world_size, accumulation)
    feeders = [LocalFeeder(config, rank, world_size) for rank in range(world_size)]
    slices = [feeder.get(5, micro) for feeder in feeders for micro in range(accumulation)]
    assert {len(part.lengths) for part in slices} == {16 // (world_size * accumulation)}
    assert_equal(concatenate(slices), build_task(config.data).rows(3, 5, 16))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_does_not_depend_on_what_was_asked_before(name: str, text: str) -> None:
    config = config_of(name, text, accumulation=2)
    resumed, uninterrupted = LocalFeeder(config, 0, 1), LocalFeeder(config, 0, 1)
    for step in range(7):
        uninterrupted.get(step, 0)
        uninterrupted.validation(0)
    assert_equal(resumed.get(7, 1), uninterrupted.get(7, 1))


@pytest.mark.parametrize("name", NAMES)
def test_steps_micro_batches_and_seeds_differ(name: str, text: str) -> None:
    config = config_of(name, text, accumulation=2)
    feeder = LocalFeeder(config, 0, 1)
    config.seed = 4
    reseeded = LocalFeeder(config, 0, 1).get(0, 0)
    config.seed = 3
    batches = [feeder.get(0, 0), feeder.get(0, 1), feeder.get(1, 0), reseeded]
    assert len({batch.inputs.tobytes() for batch in batches}) == len(batches)


@pytest.mark.parametrize(("name", "count"), [("parity", 16), ("logic", 16), ("text", 16 * 20)])
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_count_is_of_the_whole_batch(name: str, count: int, accumulation: int, world_size: int, text: str) -> None:
    feeder = LocalFeeder(config_of(name, text, world_size, accumulation), 0, world_size)
    assert feeder.get(0, 0).global_count == count


@pytest.mark.parametrize(
    ("world_size", "examples", "name", "accumulation"), every_pair(WORLD_SIZES, [1, 10, 16, 33], NAMES, ACCUMULATIONS)
)
def test_every_validation_example_is_seen_once(name: str, accumulation: int, world_size: int, examples: int, text: str) -> None:
    config = config_of(name, text, world_size, accumulation, examples)
    feeders = [LocalFeeder(config, rank, world_size) for rank in range(world_size)]
    indices = range(num_validation_batches(config, world_size))
    slices = [[feeder.validation(index) for feeder in feeders] for index in indices]
    assert {len(part.lengths) for across in slices for part in across} == {16 // (world_size * accumulation)}

    seen = concatenate([part for across in slices for part in across])
    counts = seen.lengths > 0
    whole = build_task(config.data).validation_rows(0, examples)
    assert np.array_equal(seen.inputs[counts], whole.inputs) and np.array_equal(seen.targets[counts], whole.targets)
    assert not seen.inputs[~counts].any() and not seen.targets[~counts].any()
    assert sum(across[0].global_count for across in slices) == whole.global_count
    assert all(part.global_count == across[0].global_count for across in slices for part in across)


def test_validation_does_not_depend_on_the_seed(text: str) -> None:
    config = config_of("parity", text)
    one = LocalFeeder(config, 0, 1).validation(0)
    config.seed = 4
    assert_equal(one, LocalFeeder(config, 0, 1).validation(0))
