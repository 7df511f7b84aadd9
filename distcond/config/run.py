"""The configuration of a whole run."""

from dataclasses import dataclass, field

from distcond.config.check import need
from distcond.config.choices import TEXTS, DataName, ModelName, TrackingMode
from distcond.config.cluster import ClusterConfig, SweepConfig
from distcond.config.data import DataConfig
from distcond.config.model import ModelConfig
from distcond.config.optim import CheckpointConfig, OptimConfig, TrainConfig


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """The wandb mirror of `metrics.jsonl`."""

    mode: TrackingMode = TrackingMode.auto
    "auto: online where a wandb key is present, else offline."
    project: str = "distcond"
    "wandb project."
    group: str = ""
    "wandb group; a sweep sets its own name."
    tags: list[str] = field(default_factory=list)
    "wandb tags."
    samples: int = 4
    """Validation examples that each validation keeps, with what the model made of them, in RUN/eval/samples.jsonl; >= 0. 0: no
    pictures at all, the trees of RUN/eval/trees.jsonl neither."""

    def __post_init__(self) -> None:
        need(self.samples >= 0, f"tracking.samples={self.samples} is negative; use 0 for none.")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The run folder `<dir>/<name>` is the contract between commands."""

    name: str = ""
    "Name of the run; a name used again continues that run; empty: made from model, data and time."
    dir: str = "runs"
    "Folder of run folders."
    fork: bool = False
    "Start a new run, `<name>-fork`, from the newest checkpoint of run.name, with its settings but for those that are typed."

    def __post_init__(self) -> None:
        need(
            "/" not in self.name and self.name not in {".", ".."},
            f"run.name={self.name!r} must be a plain folder name; put the folder into run.dir.",
        )
        need(bool(self.name) or not self.fork, "run.fork=true needs the run to start from; give run.name.")


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    seed: int = 0
    "Seed of parameters and data; >= 0."
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        need(self.seed >= 0, f"seed={self.seed} is negative; use 0 or more.")
        parts = self.cluster.num_workers * self.optim.accumulation
        size = self.data.global_batch_size
        lower, workers, accumulation = size // parts * parts, self.cluster.num_workers, self.optim.accumulation
        need(
            parts <= size,
            f"cluster.num_workers={workers}{f' x optim.accumulation={accumulation}' if accumulation > 1 else ''} is more than "
            f"data.global_batch_size={size}, for every worker needs an example at a time; use a smaller number, or "
            f"data.global_batch_size={parts}.",
        )
        need(
            size % parts == 0,
            f"data.global_batch_size={size} is not divisible by cluster.num_workers x optim.accumulation = {parts}; "
            f"use {lower} or {lower + parts}.",
        )
        check_reads(self.model.name, self.data.name, is_text=self.data.name in TEXTS or self.data.name not in {*DataName})


def check_reads(model: str, data: str, *, is_text: bool) -> None:
    """Refuse a model that reads bytes for data which are vectors; a task of another package says only once it is built."""
    need(
        model != ModelName.transformer or is_text,
        f"model=transformer reads bytes, but data={data} gives vectors; use model=rnn or model=mlp.",
    )


def micro_batch_size(config: Config) -> int:
    """Examples of one rank in one micro-batch."""
    return config.data.global_batch_size // (config.cluster.num_workers * config.optim.accumulation)
