"""What a run is made of: typed dataclasses that hold every default, its meaning, unit and range.

YAML files under `conf/` say only what differs from here. After composition a configuration is read-only.
"""

from distcond.config.choices import (
    TEXTS,
    CellName,
    ClusterName,
    DataName,
    GateGradient,
    GateName,
    HaltingKind,
    Kernels,
    ModelName,
    Precision,
    Schedule,
    Search,
    Storage,
    TrackingMode,
)
from distcond.config.cluster import ClusterConfig, SweepConfig
from distcond.config.data import DataConfig
from distcond.config.model import HaltingConfig, ModelConfig, TreeConfig
from distcond.config.optim import CheckpointConfig, OptimConfig, TrainConfig
from distcond.config.run import Config, RunConfig, TrackingConfig, micro_batch_size

__all__ = [
    "TEXTS",
    "CellName",
    "CheckpointConfig",
    "ClusterConfig",
    "ClusterName",
    "Config",
    "DataConfig",
    "DataName",
    "GateGradient",
    "GateName",
    "HaltingConfig",
    "HaltingKind",
    "Kernels",
    "ModelConfig",
    "ModelName",
    "OptimConfig",
    "Precision",
    "RunConfig",
    "Schedule",
    "Search",
    "Storage",
    "SweepConfig",
    "TrackingConfig",
    "TrackingMode",
    "TrainConfig",
    "TreeConfig",
    "micro_batch_size",
]
