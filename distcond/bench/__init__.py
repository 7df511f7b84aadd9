"""`distcond bench`: how far layers and tables are from what the machine allows, all timed in turn in one process."""

from distcond.bench.report import show
from distcond.bench.table import bench_table
from distcond.bench.tree import bench_tree

BENCHES = {"tree": bench_tree, "table": bench_table}

__all__ = ["BENCHES", "bench_table", "bench_tree", "show"]
