"""Training: the engine beside DeepSpeed, the loop, its hooks, checkpoints and metrics."""
