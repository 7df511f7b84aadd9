"""A task and a model of your own, whole: copy it beside the pyproject.toml of distcond's conf/README.md, and install both."""

import numpy as np
import torch
from torch import Tensor, nn

from distcond.config import DataConfig, ModelConfig
from distcond.data import Batch, TaskShape
from distcond.nn import PonderStats, make_linear, pondering, tree_options


class Majority:
    """Has a vector of bits more ones than zeros? What a task is asked for says `Task` in distcond/data/tasks.py."""

    kind, output_size, num_classes, max_length = "vectors", 1, 1, 1

    def __init__(self, config: DataConfig) -> None:
        self.input_size = config.options["bits"]

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        """Vectors [B, 1, bits] and targets [B, 1, 1]: the same for the same arguments, whatever was asked before."""
        bits = np.random.default_rng([seed, step]).integers(0, 2, (size, 1, self.input_size))[part]
        targets = bits.mean(axis=2, keepdims=True) > 0.5
        return Batch(bits.astype(np.float32), targets.astype(np.float32), np.ones(len(bits), np.int64), size)

    def validation_rows(self, start: int, size: int) -> Batch:
        """Of a step that no training reaches."""
        return self.rows(0, 2**62, 4096, slice(start, start + size))

    def fingerprint(self) -> dict[str, object]:
        """What the data is, for environment.json."""
        return {"name": "majority", "bits": self.input_size}


class Cell(nn.Module):
    """One ponder step of the rows that still run, by a matrix that may be a tree."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = make_linear(config.width + 1, config.width, tree_options(config.tree))

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        """x [R, 1], which is 1 in a row's first step; state [R, width]; rows: their places among B x T."""
        return state + torch.tanh(self.linear(torch.cat([state, x], dim=1)))


class Residual(nn.Module):
    """A state is read from each vector, pondered on, and judged. `task` has the sizes of the task alone."""

    def __init__(self, config: ModelConfig, task: TaskShape) -> None:
        super().__init__()
        self.read, self.head = nn.Linear(task.input_size, config.width), nn.Linear(config.width, task.output_size)
        self.ponder = pondering(Cell(config), config.width, config.halting)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, PonderStats]:
        """Vectors [B, T, input_size] -> logits [B, T, output_size], and what each of the B x T positions spent."""
        state = self.read(inputs).flatten(0, 1)
        state, stats = self.ponder(state[:, :0], state)
        return self.head(state).unflatten(0, inputs.shape[:2]), stats.read(self.head)
