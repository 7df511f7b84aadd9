"""Somebody else's model and DeepSpeed loop, which know of distcond only its layers and `distcond.initialize`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distcond
from distcond.nn import AdaptiveComputation, TreeLinear
from tests.trees import seed_cpu

BATCH, WIDTH, CLIP = 16, 6, 0.5
ADAM = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}

WARMUP = {"warmup_min_lr": 1e-3, "warmup_max_lr": 1e-2, "warmup_num_steps": 4}


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tree = TreeLinear(2 * WIDTH + 1, WIDTH, depth=3, storage="lazy")

    def forward(self, x: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        return torch.tanh(self.tree(torch.cat([x, state], dim=1)))


class Theirs(nn.Module):
    """A model as people write them: a low-rank lazy tree, a dense tree, a pondering cell, and ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.deep = TreeLinear(WIDTH, WIDTH, depth=6, full_depth=1, rank=2, storage="lazy")
        self.ponder = AdaptiveComputation(Cell(), WIDTH, max_steps=5)
        self.plain = TreeLinear(WIDTH, WIDTH, depth=2, storage="dense")
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.deep(self.first(x))
        state, stats = self.ponder(hidden, torch.zeros_like(hidden))
        error = self.last(self.plain(state))[:, 0] - y
        return (error**2).mean() + 0.01 * stats.ponder_cost.mean()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """A global batch; rows differ much in size, so that ranks ponder and route differently."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 4, generator=generator) * torch.linspace(0.1, 3.0, BATCH)[:, None]
    return x, x.prod(1).sign()


def ds_config(stage: int, accumulation: int, clip: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {**WARMUP, "warmup_type": "linear"}},
    }


def start(stage: int, accumulation: int = 1, clip: float = CLIP, seed: int = 0, **options: Any) -> Any:
    seed_cpu(seed)
    model = Theirs()
    config = ds_config(stage, accumulation, clip)
    engine, *_ = distcond.initialize(model=model, config=config, model_parameters=model.parameters(), **options)
    return engine


def train(engine: Any, first: int, last: int) -> list[float]:
    """The loop as a user of DeepSpeed writes it; losses of the steps, mean over ranks."""
    parts = engine.gradient_accumulation_steps()
    losses = []
    for step in range(first, last):
        x, y = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch(step))
        total = torch.zeros(())
        for micro_x, micro_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = engine(micro_x, micro_y)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / parts
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses
