"""Optimisers that cost what was touched; plain torch."""

from distcond.optim.row_adam import RowAdam

__all__ = ["RowAdam"]
