"""Parity and logic, against implementations that share nothing with ours."""

import numpy as np
import pytest

from distcond.data.graves import logic, parity

GATES = [  # table 1 of the paper, in its order, as formulas
    lambda p, q: not (p or q),
    lambda p, q: (not p) and q,
    lambda p, q: p and not q,
    lambda p, q: p != q,
    lambda p, q: not (p and q),
    lambda p, q: p and q,
    lambda p, q: p == q,
    lambda p, q: (not p) or q,
    lambda p, q: p or not q,
    lambda p, q: p or q,
]


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("num_bits", [1, 5, 64])
def test_parity_is_whether_the_number_of_ones_is_odd(num_bits: int, scattered: bool) -> None:
    batch = parity(num_bits, scattered=scattered).rows(0, 0, 500)
    assert batch.inputs.shape == (500, 1, num_bits) and batch.targets.shape == (500, 1, 1)
    assert batch.inputs.dtype == batch.targets.dtype == np.float32
    assert batch.lengths.tolist() == [1] * 500
    for vector, target in zip(batch.inputs[:, 0].tolist(), batch.targets[:, 0, 0].tolist(), strict=True):
        assert target == vector.count(1.0) % 2
        assert 1 <= vector.count(1.0) + vector.count(-1.0) == num_bits - vector.count(0.0)
    set_BN = batch.inputs[:, 0] != 0
    assert (set_BN.cumprod(axis=1) == set_BN).all() == (not scattered or num_bits == 1)


def test_parity_draws_counts_places_and_signs_evenly() -> None:
    """10,000 rows: a share of 1/4 has a standard error of 0.0043, one of 1/2 of 0.005; both bounds are four of them."""
    vectors = parity(4).rows(0, 0, 10_000).inputs[:, 0]
    counts = np.count_nonzero(vectors, axis=1)
    assert np.abs(np.bincount(counts, minlength=5)[1:] / 10_000 - 1 / 4).max() < 0.018
    places = vectors[counts == 2] != 0
    assert np.abs(places.mean(axis=0) - 1 / 2).max() < 0.04  # a quarter of the rows, so twice the error
    assert abs((vectors == 1).sum() / counts.sum() - 1 / 2) < 0.02


def test_the_number_of_set_bits_can_differ_in_validation() -> None:
    task = parity(48, set_bits=[2, 32], validation_set_bits=[33, 48])
    counts = [np.count_nonzero(batch.inputs, axis=2) for batch in (task.rows(0, 0, 2000), task.validation_rows(0, 2000))]
    assert [(count.min(), count.max()) for count in counts] == [(2, 32), (33, 48)]
    alike = parity(48, set_bits=[2, 32])
    assert np.count_nonzero(alike.validation_rows(0, 2000).inputs, axis=2).max() == 32
    assert task.fingerprint() != alike.fingerprint()


@pytest.mark.parametrize("uniform_ones", [False, True])
def test_entries_of_parity_can_be_one_hot(uniform_ones: bool) -> None:
    inputs = {
        one_hot: parity(5, one_hot=one_hot, uniform_ones=uniform_ones).rows(0, 0, 200).inputs[:, 0] for one_hot in (False, True)
    }
    assert inputs[True].shape == (200, 10) and inputs[True].dtype == np.float32
    assert np.array_equal(inputs[True], np.concatenate([inputs[False] == 1, inputs[False] == -1], axis=1))


def test_ones_of_parity_can_be_as_often_many_as_few_in_training() -> None:
    """30,000 rows: a share of 1/5 of a quarter of them has a standard error of 0.0046; the bound is four of them."""
    task = parity(4, uniform_ones=True)
    for vectors, is_even in ((task.rows(0, 0, 30_000).inputs[:, 0], True), (task.validation_rows(0, 30_000).inputs[:, 0], False)):
        full = vectors[np.count_nonzero(vectors, axis=1) == 4]
        shares = np.bincount((full == 1).sum(axis=1), minlength=5) / len(full)
        wanted = np.full(5, 1 / 5) if is_even else np.array([1, 4, 6, 4, 1]) / 16
        assert np.abs(shares - wanted).max() < 0.0185
        assert np.abs((full == 1).mean(axis=0) - 1 / 2).max() < 0.03  # no place has more of them
    assert task.fingerprint() != parity(4).fingerprint()


def naive_logic(vectors: list[list[float]]) -> list[float]:
    targets: list[float] = []
    for vector in vectors:
        before, now = bool(targets[-1] if targets else vector[0]), bool(vector[1])
        for chunk in range(10):
            one_hot = vector[2 + 10 * chunk : 12 + 10 * chunk]
            if sum(one_hot):
                before, now = now, bool(GATES[one_hot.index(1.0)](now, before))
        targets.append(float(now))
    return targets


@pytest.mark.parametrize(("max_length", "max_gates"), [(1, 1), (3, 10), (10, 4), (10, 10)])
def test_logic_follows_the_chain_of_gates(max_length: int, max_gates: int) -> None:
    batch = logic(max_length, max_gates).rows(0, 0, 200)
    assert batch.inputs.shape == (200, max_length, 102) and batch.targets.shape == (200, max_length, 1)
    for vectors, targets, length in zip(batch.inputs, batch.targets, batch.lengths, strict=True):
        assert targets[:length, 0].tolist() == naive_logic(vectors[:length].tolist())


@pytest.mark.parametrize(("max_length", "max_gates"), [(1, 1), (10, 4), (10, 10)])
def test_logic_vectors_are_as_the_paper_says(max_length: int, max_gates: int) -> None:
    batch = logic(max_length, max_gates).rows(0, 1, 500)
    inside = np.arange(max_length) < batch.lengths[:, None]
    chunks = batch.inputs[:, :, 2:].reshape(500, max_length, 10, 10).sum(axis=3)
    used = chunks.sum(axis=2)
    assert set(np.unique(batch.inputs)) | set(np.unique(batch.targets)) <= {0.0, 1.0}
    assert set(batch.lengths.tolist()) == set(range(1, max_length + 1))
    assert set(used[inside].tolist()) == set(range(1, max_gates + 1))
    assert np.array_equal(chunks, np.arange(10) < used[..., None])  # one-hot, and the used chunks come first
    assert not batch.inputs[:, 1:, 0].any()  # b_0 is hidden from the second vector on
    assert not batch.inputs[~inside].any() and not batch.targets[~inside].any()
    assert batch.inputs[:, 0, 0].any() and (max_length == 1 or batch.inputs[:, 1:, 1].any())


def test_every_gate_is_drawn() -> None:
    gates = logic(10, 10).rows(0, 0, 100).inputs[:, :, 2:].reshape(-1, 10).sum(axis=0)
    assert np.abs(gates / gates.sum() - 1 / 10).max() < 0.03  # some 3,000 gates: four standard errors are 0.022
