"""Generated tasks: what a row is depends on nothing but its address."""

import numpy as np
import pytest

from distcond.data.addition import addition
from distcond.data.generated import VALIDATION_BLOCK, GeneratedTask
from distcond.data.graves import logic, parity
from distcond.data.sort import sort


@pytest.mark.parametrize("task", [parity(8), logic(4, 3), addition(3, 2), sort(4)], ids=lambda task: task.name)
def test_a_validation_row_is_the_same_whoever_asks(task: GeneratedTask) -> None:
    size = 2 * VALIDATION_BLOCK + 10
    whole = task.validation_rows(0, size)
    for start, stop in [(0, 3), (250, 260), (VALIDATION_BLOCK, 2 * VALIDATION_BLOCK), (255, 513), (500, size)]:
        part = task.validation_rows(start, stop - start)
        assert np.array_equal(part.inputs, whole.inputs[start:stop])
        assert np.array_equal(part.targets, whole.targets[start:stop])
        assert np.array_equal(part.lengths, whole.lengths[start:stop])
        assert part.global_count == stop - start
    assert len(task.validation_rows(VALIDATION_BLOCK, 0).lengths) == 0


def test_validation_is_not_what_seed_0_trains_on() -> None:
    task = parity(64)
    trained = {row.tobytes() for step in range(20) for row in task.rows(0, step, VALIDATION_BLOCK).inputs}
    assert not trained & {row.tobytes() for row in task.validation_rows(0, 1000).inputs if np.count_nonzero(row) > 8}


def test_steps_and_seeds_draw_other_rows() -> None:
    rows = [sort(4).rows(seed, step, 8).inputs.tobytes() for seed in (0, 1) for step in (0, 1)]
    assert len(set(rows)) == 4 and sort(4).rows(1, 1, 8).inputs.tobytes() == rows[3]


@pytest.mark.parametrize(
    ("task", "most"), [(parity(8), 8), (logic(4, 3), 3), (addition(3, 2), 2)], ids=["parity", "logic", "addition"]
)
def test_elements_are_told_apart_by_how_much_they_have(task: GeneratedTask, most: int) -> None:
    batch = task.rows(0, 0, 300)
    amount = task.measured(batch.inputs)
    inside = np.arange(task.max_length) < batch.lengths[:, None]
    assert task.measure and set(amount[inside].tolist()) == set(range(1, most + 1)) and not amount[~inside].any()
