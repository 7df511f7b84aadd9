"""Where metrics go: `metrics.jsonl` and samples, which are the truth, and a wandb run that mirrors them, at once or later."""

from distcond.tracking.identity import WandbRun, wandb_run
from distcond.tracking.sending import NoKeyError, SendError, has_unsent, send
from distcond.tracking.tracker import CLOSE_TIMEOUT_S, METRICS, SAMPLES, Tracker

__all__ = [
    "CLOSE_TIMEOUT_S",
    "METRICS",
    "SAMPLES",
    "NoKeyError",
    "SendError",
    "Tracker",
    "WandbRun",
    "has_unsent",
    "send",
    "wandb_run",
]
