"""Configuration of training: optimiser, length and rhythm, checkpoints."""

from dataclasses import dataclass, field
from typing import Any

from distcond.config.check import need
from distcond.config.choices import Precision, Schedule


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Adam for the dense part under DeepSpeed, the same Adam by rows for the node tables."""

    lr: float = 1.0e-3
    "Peak learning rate; > 0."
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    "Decay of the two moments; each in [0, 1)."
    eps: float = 1.0e-8
    "Added to the root of the second moment; > 0."
    weight_decay: float = 0.0
    "Decoupled weight decay per unit of learning rate; >= 0."
    grad_clip: float = 1.0
    "Largest global norm of the gradient, dense part and rows together; 0: no clipping."
    accumulation: int = 1
    "Micro-batches per optimiser step; >= 1."
    zero_stage: int = 1
    "DeepSpeed ZeRO stage of the dense part; 0 to 3."
    precision: Precision = Precision.fp32
    "Arithmetic of the dense part."
    schedule: Schedule = Schedule.constant
    "Learning rate after warm-up: constant, or cosine down to zero at train.max_steps."
    warmup_steps: int = 0
    "Steps of linear warm-up; >= 0."
    deepspeed: dict[str, Any] = field(default_factory=dict)
    "Further DeepSpeed options, passed through; what distcond derives itself is refused."

    def __post_init__(self) -> None:
        need(self.lr > 0, f"optim.lr={self.lr} is not positive; e.g. 1e-3.")
        need(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas} must be two numbers in [0, 1), e.g. [0.9, 0.999].",
        )
        need(self.eps > 0, f"optim.eps={self.eps} is not positive; e.g. 1e-8.")
        need(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} is negative; use 0 or more.")
        need(self.grad_clip >= 0, f"optim.grad_clip={self.grad_clip} is negative; use 0 for no clipping.")
        need(self.accumulation >= 1, f"optim.accumulation={self.accumulation} is below 1; use 1 or more.")
        need(0 <= self.zero_stage <= 3, f"optim.zero_stage={self.zero_stage} is outside 0..3.")
        need(
            self.precision == Precision.fp32 or self.zero_stage > 0,
            "optim.precision=bf16 with optim.zero_stage=0 keeps no fp32 weights that a checkpoint could hold; use zero_stage=1.",
        )
        need(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps} is negative; use 0 or more.")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length and rhythm of a run."""

    max_steps: int = 900
    "Optimiser steps; >= 1."
    log_every: int = 10
    "Steps between rows of training metrics; >= 1."
    eval_every: int = 300
    "Steps between validations; >= 1. The last step is always validated."
    max_bad_steps: int = 10
    "Steps in a row without a finite loss and gradient (each is left out) before a run goes back to a checkpoint; >= 1."
    init_from: str = ""
    """A run, by its folder or its name in run.dir, from whose newest checkpoint a new one takes the weights: the same function,
    as a tree where model.tree makes a linear layer one, and deeper where it asks for more levels. Empty: fresh weights."""
    profile: bool = False
    "Write a torch profiler trace of steps 5 to 9 into RUN/logs/profile."
    peak_tflops: float | None = None
    "Peak of one device in TFLOP/s, for perf/mfu; null: taken from a table of GPUs, else not reported."

    def __post_init__(self) -> None:
        for name in ("max_steps", "log_every", "eval_every", "max_bad_steps"):
            value = getattr(self, name)
            need(value >= 1, f"train.{name}={value} is below 1; use 1 or more.")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When the state of a run is written."""

    every: int = 300
    "Steps between checkpoints; >= 1. The last step is always saved."
    keep_last: int = 2
    "The newest checkpoints that are kept; >= 1."
    keep_best: int = 1
    "Checkpoints kept because of their validation, made at the same step, whatever their age; >= 0."

    def __post_init__(self) -> None:
        need(self.every >= 1, f"checkpoint.every={self.every} is below 1; use 1 or more.")
        need(self.keep_last >= 1, f"checkpoint.keep_last={self.keep_last} is below 1; use 1 or more.")
        need(self.keep_best >= 0, f"checkpoint.keep_best={self.keep_best} is negative; use 0 or more.")
