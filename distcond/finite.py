"""JSON knows neither NaN nor infinity; other programs refuse a file in which Python has spelt them."""

import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """What JSON can hold: the same value, but None where a number in it, however deep, is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value
