"""`distcond evaluate RUN`: a checkpoint measured in this process, without Ray or DeepSpeed."""

from distcond.evaluate.measure import evaluate
from distcond.evaluate.table import table

__all__ = ["evaluate", "table"]
