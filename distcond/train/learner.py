"""The model of a run."""

from distcond.config import ModelConfig
from distcond.data.tasks import Task
from distcond.nn.model import Learner, build_learner


def learner_for(config: ModelConfig, task: Task) -> Learner:
    """The model of a configuration for a task, with fresh parameters from torch's generator."""
    return build_learner(
        config,
        is_text=task.kind == "bytes",
        input_size=task.input_size,
        output_size=task.output_size,
        num_classes=task.num_classes,
    )
