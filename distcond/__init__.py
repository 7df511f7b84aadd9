"""Distributed training of models that choose their weights and their amount of computation from the data.

`distcond.nn`, `distcond.ops` and `distcond.optim` need torch alone; everything else is imported on first use.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "initialize"]


def __getattr__(name: str) -> Any:
    """Import `initialize` on first use: it brings in DeepSpeed, which the layers alone do not need."""
    if name == "initialize":
        from distcond.train.engine import initialize

        return initialize
    raise AttributeError(f"module 'distcond' has no attribute {name!r}")
