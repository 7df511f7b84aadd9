"""`distcond bench`: how far layers and tables are from what the machine allows and from rivals, timed in turn in one process."""

from distcond.bench.exchange import bench_exchange
from distcond.bench.halting import bench_halting
from distcond.bench.interconnect import Interconnect
from distcond.bench.report import machine, show
from distcond.bench.table import bench_table
from distcond.bench.train import bench_train
from distcond.bench.tree import bench_tree

BENCHES = {"tree": bench_tree, "table": bench_table, "exchange": bench_exchange, "train": bench_train, "halting": bench_halting}

__all__ = [
    "BENCHES",
    "Interconnect",
    "bench_exchange",
    "bench_halting",
    "bench_table",
    "bench_train",
    "bench_tree",
    "machine",
    "show",
]
