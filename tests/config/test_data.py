"""Configuration of the data: what cannot be drawn is refused."""

from typing import Any

import pytest

from distcond.config import DataConfig
from distcond.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "addition", "max_length": 11}, "data.max_length=11 .* use 10 or fewer"),
        ({"name": "addition", "max_digits": 18}, "data.max_digits=18 is outside 1..17"),
        ({"name": "addition", "max_digits": 0}, "data.max_digits=0 is outside 1..17"),
        ({"name": "sort", "max_length": 1}, "data.max_length=1 leaves nothing to sort; use 2 or more"),
        ({"set_bits": [1]}, r"data.set_bits=\[1\]: needed are two numbers, 1 <= fewest <= most <= data.num_bits=64"),
        ({"set_bits": [9, 8]}, r"data.set_bits=\[9, 8\]: needed"),
        ({"validation_set_bits": [1, 65]}, r"data.validation_set_bits=\[1, 65\]: needed"),
        ({"name": "logic", "max_gates": 11}, "data.max_gates=11 is outside 1..10"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"name": "addition", "max_digits": 17}, {"name": "sort", "max_length": 2}, {"max_length": 11}, {"set_bits": [1, 64]}],
)
def test_the_limits_themselves_are_fine(options: dict[str, Any]) -> None:
    assert DataConfig(**options)
