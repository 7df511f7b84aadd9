"""Tasks, and the batches a rank is fed with. Needs numpy alone: processes that compute batches stay small."""

from distcond.config.shape import TaskShape
from distcond.data.batch import Batch
from distcond.data.batches import Feeder, LocalFeeder, num_validation_batches
from distcond.data.tasks import Task, build_task, check_files
from distcond.data.text import absolute_paths

__all__ = [
    "Batch",
    "Feeder",
    "LocalFeeder",
    "Task",
    "TaskShape",
    "absolute_paths",
    "build_task",
    "check_files",
    "num_validation_batches",
]
