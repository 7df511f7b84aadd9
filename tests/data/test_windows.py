"""Windows over a corpus."""

import numpy as np
import pytest

from distcond.data.corpus import Corpus
from distcond.data.stream import Stream
from distcond.data.windows import ByteTask
from distcond.errors import DataError


def task_of(train: int, validation: int = 1000, context: int = 16, examples: int = 7) -> ByteTask:
    """Bytes that tell where they are from: position modulo 128 in training, 128 more in validation."""
    texts = (np.arange(train) % 128).astype(np.uint8), (128 + np.arange(validation) % 128).astype(np.uint8)
    return ByteTask(Corpus(*(Stream([text]) for text in texts), {"source": "text"}), context, examples)


def test_targets_are_the_next_bytes_of_the_text() -> None:
    task = task_of(1000)
    batch = task.rows(0, 0, 200)
    assert batch.inputs.dtype == batch.targets.dtype == np.uint8 and batch.inputs.shape == (200, 16)
    assert np.array_equal(batch.targets, (batch.inputs + 1) % 128)
    assert np.array_equal(batch.inputs, (batch.inputs[:, :1] + np.arange(16)) % 128)
    assert batch.lengths.tolist() == [16] * 200 and batch.global_count == 200 * 16


def test_every_window_of_the_training_text_can_be_drawn_and_no_other() -> None:
    batch = task_of(16 + 3).rows(0, 0, 100)
    assert set(batch.inputs[:, 0].tolist()) == {0, 1, 2}
    assert set(batch.targets[:, -1].tolist()) == {16, 17, 18}


@pytest.mark.parametrize("part", [slice(0, 8), slice(8, 16), slice(31, 32), slice(5, 5)])
def test_a_part_is_those_rows_of_the_whole(part: slice) -> None:
    task = task_of(1000)
    assert np.array_equal(task.rows(1, 2, 32, part).inputs, task.rows(1, 2, 32).inputs[part])
    assert task.rows(1, 2, 32, part).global_count == 32 * 16


def test_validation_windows_are_even_over_the_held_out_text() -> None:
    """100 places of 116 - 16: window i starts at floor(100 i / 7)."""
    batch = task_of(1000, validation=116).validation_rows(0, 7)
    assert batch.inputs[:, 0].tolist() == [128 + start for start in (0, 14, 28, 42, 57, 71, 85)]


def test_validation_never_shows_training_text() -> None:
    task = task_of(1000)
    batch = task.validation_rows(0, 7)
    assert batch.inputs.min() >= 128 and batch.targets.min() >= 128
    assert task.rows(0, 0, 500).targets.max() < 128


def test_more_windows_than_places_overlap_and_stay_inside() -> None:
    batch = task_of(1000, validation=18, examples=50).validation_rows(0, 50)
    assert set(batch.inputs[:, 0].tolist()) == {128, 129}


@pytest.mark.parametrize(("train", "validation", "split"), [(16, 17, "train"), (17, 16, "validation"), (0, 0, "train")])
def test_a_text_shorter_than_a_window_is_refused_in_one_line(train: int, validation: int, split: str) -> None:
    size = train if split == "train" else validation
    with pytest.raises(DataError, match=rf"^data=text has {size} bytes of {split} text.*data\.context=16.*17.*$") as caught:
        task_of(train, validation)
    assert "\n" not in str(caught.value)


def test_a_text_of_one_window_is_enough() -> None:
    assert (task_of(17, 17).rows(0, 0, 4).inputs[:, 0] == 0).all()
