"""Two generated tasks of Graves 2016 (arXiv 1603.08983, sections 3.1 and 3.2): parity and logic.

Shapes: B examples, T time steps, G gates of a vector.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from distcond.data.batch import Batch
from distcond.data.generated import GeneratedTask, Options

NUM_GATES = 10
"Kinds of gates, and the most gates of one logic vector."
TRUTH_COLUMNS = {  # value for PQ = TT, TF, FT, FF (table 1)
    "NOR": "FFFT",
    "Xq": "FFTF",
    "ABJ": "FTFF",
    "XOR": "FTTF",
    "NAND": "FTTT",
    "AND": "TFFF",
    "XNOR": "TFFT",
    "if/then": "TFTT",
    "then/if": "TTFT",
    "OR": "TTTF",
}
TRUTH = np.array([[c == "T" for c in column] for column in TRUTH_COLUMNS.values()]).reshape(NUM_GATES, 2, 2)[:, ::-1, ::-1]
"bool [gate, P, Q]."


def parity(
    num_bits: int,
    *,
    scattered: bool = True,
    set_bits: Sequence[int] = (),
    validation_set_bits: Sequence[int] = (),
    one_hot: bool = False,
    uniform_ones: bool = False,
) -> GeneratedTask:
    """Is the number of ones in a vector odd?

    set_bits: fewest and most entries that are not 0, and of the validation set where they differ; empty: 1 and num_bits.
    one_hot: inputs [B, 1, 2 num_bits], first which entries are +1, then which are -1. The number of ones is then linear in
    them, and scattered bits are learned (distcond/nn/README.md).
    uniform_ones: of n entries that are not 0 any number is +1 in training, 0 to n alike often, so that many ones are not rare;
    false, and in validation always: each by the toss of a coin.

    inputs [B, 1, num_bits]: a random number of entries, 1 to num_bits, are +1 or -1, the others 0; scattered: they stand
    anywhere, else they are the first ones. The paper can be read either way, but its curves belong to the second: with 64
    scattered bits, 128 tanh units are at 49% to 50% after 60,000 updates of Adam (rates of 5e-4 to 3e-3, with and without
    halting); with the first ones, two steps for everyone reach 14% after 30,000.
    targets [B, 1, 1]: 1 if the number of entries equal to +1 is odd, else 0. The paper says "an odd number of ones"
    and names the entries "1 or -1", so a -1 is not a one; this is also how others have rebuilt the task.
    """
    trained = tuple(set_bits) or (1, num_bits)
    validated = tuple(validation_set_bits) or trained

    def draw(bits: tuple[int, ...], uniform: bool, rng: np.random.Generator, size: int) -> Batch:
        counts = rng.integers(bits[0], bits[1] + 1, (size, 1))
        chosen = (rng.random((size, num_bits)).argsort(axis=1) if scattered else np.arange(num_bits)) < counts
        if uniform:
            order = np.where(chosen, rng.random((size, num_bits)), 2.0).argsort(axis=1).argsort(axis=1)
            signs = np.where(order < rng.integers(0, counts + 1), 1, -1)
        else:
            signs = 2 * rng.integers(0, 2, (size, num_bits)) - 1
        inputs = np.where(chosen, signs, 0)
        targets = (inputs == 1).sum(axis=1) % 2
        if one_hot:
            inputs = np.concatenate([inputs == 1, inputs == -1], axis=1)
        return Batch(
            inputs[:, None, :].astype(np.float32),
            targets[:, None, None].astype(np.float32),
            np.ones(size, np.int64),
            size,
        )

    options: Options = {"num_bits": num_bits, "scattered": scattered, "set_bits": list(trained)}
    options["validation_set_bits"] = list(validated)
    options |= {name: True for name, value in (("one_hot", one_hot), ("uniform_ones", uniform_ones)) if value}
    size, draws = num_bits * (1 + one_hot), (partial(draw, trained, uniform_ones), partial(draw, validated, False))
    return GeneratedTask("parity", size, 1, 1, draws[0], options, draw_validation=draws[1], measure="set_bits")


def logic(max_length: int, max_gates: int) -> GeneratedTask:
    """What does a chain of logic gates give, over and over?

    inputs [B, T, 102]: 1 to max_length vectors, two bits b_0, b_1 and ten chunks that hold one gate each, one-hot of ten;
    1 to max_gates chunks are used, the rest is 0. From the second vector on, b_0 is the previous target and shown as 0.
    targets [B, T, 1]: b_{n+1} of the last gate n, where b_{i+1} = T_i(b_i, b_{i-1}), so P = b_i and Q = b_{i-1}.
    """

    def draw(rng: np.random.Generator, size: int) -> Batch:
        lengths = rng.integers(1, max_length + 1, size)
        bits_BT2 = rng.integers(0, 2, (size, max_length, 2))
        bits_BT2[:, 1:, 0] = 0
        gates_BTG = rng.integers(0, NUM_GATES, (size, max_length, max_gates))
        used_BTG = np.arange(max_gates) < rng.integers(1, max_gates + 1, (size, max_length, 1))
        one_hot = np.eye(NUM_GATES)[gates_BTG] * used_BTG[..., None]

        inputs = np.zeros((size, max_length, 2 + NUM_GATES * NUM_GATES), np.float32)
        inputs[..., :2] = bits_BT2
        inputs[..., 2 : 2 + max_gates * NUM_GATES] = one_hot.reshape(size, max_length, -1)
        targets = _evaluate(bits_BT2, gates_BTG, used_BTG)[..., None].astype(np.float32)

        counts = (np.arange(max_length) < lengths[:, None])[..., None]
        return Batch(inputs * counts, targets * counts, lengths, size)

    options: Options = {"max_length": max_length, "max_gates": max_gates}

    def count_gates(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(np.count_nonzero(inputs[:, :, 2:], axis=2))

    size = 2 + NUM_GATES * NUM_GATES
    return GeneratedTask("logic", size, 1, max_length, draw, options, measure="gates", measured=count_gates)


def _evaluate(bits_BT2: np.ndarray, gates_BTG: np.ndarray, used_BTG: np.ndarray) -> np.ndarray:
    """Result of each vector's chain of gates, int64 [B, T]; the used gates of a vector are its first ones."""
    results_BT = np.empty(bits_BT2.shape[:2], np.int64)
    result = bits_BT2[:, 0, 0]
    for t in range(bits_BT2.shape[1]):
        older, newer = result, bits_BT2[:, t, 1]
        for g in range(gates_BTG.shape[2]):
            used, output = used_BTG[:, t, g], TRUTH[gates_BTG[:, t, g], newer, older]
            older, newer = np.where(used, newer, older), np.where(used, output, newer)
        results_BT[:, t] = result = newer
    return results_BT
