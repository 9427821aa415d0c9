"""The training loop and what it keeps: schedule, checkpoints, validation, metrics, signals."""
