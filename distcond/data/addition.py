"""Addition of Graves 2016 (arXiv 1603.08983, section 3.3): numbers are read one after the other and summed up.

Shapes: B examples, T time steps, D digits.
"""

import numpy as np

from distcond.data.batch import NO_TARGET, Batch
from distcond.data.generated import GeneratedTask, Options

END = 10
"The class after a sum's last digit."


def addition(max_length: int, max_digits: int) -> GeneratedTask:
    """What is the sum of the numbers so far?

    inputs [B, T, 10 max_digits]: 1 to max_length numbers of 1 to max_digits digits, each drawn from 0 to 9; a chunk of ten
    for each digit, one-hot, the most significant digit first; the chunks after the last digit are 0.
    targets [B, T, max_digits + 1]: the digits of the sum in the same order, without leading zeros, then END in every
    place that is left; the first number has no target. At most ten numbers, whose sum has one digit more than they have.
    """

    def draw(rng: np.random.Generator, size: int) -> Batch:
        lengths = rng.integers(1, max_length + 1, size)
        digits_BTD = rng.integers(0, 10, (size, max_length, max_digits))
        counts_BT = rng.integers(1, max_digits + 1, (size, max_length))
        used_BTD = np.arange(max_digits) < counts_BT[..., None]
        inside_BT = np.arange(max_length) < lengths[:, None]

        one_hot = np.eye(10, dtype=np.float32)[digits_BTD] * (used_BTD & inside_BT[..., None])[..., None]
        place_BTD = 10 ** np.maximum(counts_BT[..., None] - 1 - np.arange(max_digits), 0)
        sums_BT = (digits_BTD * place_BTD * used_BTD).sum(axis=2).cumsum(axis=1)
        has_target_BT = inside_BT & (np.arange(max_length) > 0)
        targets = np.where(has_target_BT[..., None], _digits(sums_BT, max_digits + 1), NO_TARGET)
        return Batch(one_hot.reshape(size, max_length, 10 * max_digits), targets, lengths, size)

    options: Options = {"max_length": max_length, "max_digits": max_digits}
    num_outputs = (END + 1) * (max_digits + 1)
    return GeneratedTask(
        "addition", 10 * max_digits, num_outputs, max_length, draw, options, num_classes=END + 1, measure="digits"
    )


def _digits(numbers_BT: np.ndarray, size: int) -> np.ndarray:
    """Digits from the first one that counts, filled up with END, int64 [B, T, size]."""
    powers = 10 ** np.arange(size - 1, -1, -1)
    digits = numbers_BT[..., None] // powers % 10
    num_leading = (numbers_BT[..., None] < powers[:-1]).sum(axis=2)  # a zero is written as one digit
    source = np.arange(size) + num_leading[..., None]
    return np.where(source < size, np.take_along_axis(digits, np.minimum(source, size - 1), axis=2), END)
