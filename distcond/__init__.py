"""Distributed training of models that choose their weights and their amount of computation from the data.

`distcond.nn`, `distcond.ops` and `distcond.optim` need torch alone; everything else is imported on first use.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "initialize", "load"]


def __getattr__(name: str) -> Any:
    """Import what is public on first use: `initialize` brings in DeepSpeed, `load` safetensors; the layers need neither."""
    if name == "initialize":
        from distcond.train.engine import initialize

        return initialize
    if name == "load":
        from distcond.deploy.load import load

        return load
    raise AttributeError(f"module 'distcond' has no attribute {name!r}")
