"""A batch, and the random numbers of a step."""

import numpy as np
import pytest

from distcond.data.batch import TRAINING, VALIDATION, Batch, generator, pad, select


def batch_of(rows: int) -> Batch:
    inputs = np.arange(rows * 3, dtype=np.uint8).reshape(rows, 3)
    return Batch(inputs, inputs + 1, np.full(rows, 3, np.int64), global_count=99)


def test_numbers_depend_on_the_arguments_alone() -> None:
    used = generator(1, 2, TRAINING)
    used.random(1000)
    assert (generator(1, 2, TRAINING).random(10) == generator(1, 2, TRAINING).random(10)).all()


@pytest.mark.parametrize("other", [(1, 2, TRAINING), (0, 3, TRAINING), (0, 2, VALIDATION)])
def test_other_seeds_steps_and_streams_have_other_numbers(other: tuple[int, int, int]) -> None:
    assert not (generator(0, 2, TRAINING).random(1000) == generator(*other).random(1000)).any()


def test_steps_never_overlap() -> None:
    """As a shifted counter would: the numbers of step 1 would be those of step 0, a few draws later."""
    drawn = [generator(0, step, TRAINING).integers(0, 2**63, 10_000) for step in range(10)]
    assert len(np.unique(np.concatenate(drawn))) == 10 * 10_000


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_padding_keeps_the_rows_and_adds_rows_that_do_not_count(rows: int) -> None:
    padded = pad(batch_of(rows), 4)
    assert (padded.inputs[:rows] == batch_of(rows).inputs).all() and (padded.targets[:rows] == batch_of(rows).targets).all()
    assert padded.lengths.tolist() == [3] * rows + [0] * (4 - rows)
    assert padded.inputs.shape == padded.targets.shape == (4, 3) and padded.inputs.dtype == np.uint8
    assert not padded.inputs[rows:].any() and not padded.targets[rows:].any()
    assert padded.global_count == 99


def test_selected_rows_keep_the_count_of_the_whole() -> None:
    part = select(batch_of(4), slice(1, 3))
    assert part.inputs.tolist() == batch_of(4).inputs[1:3].tolist()
    assert part.global_count == 99
