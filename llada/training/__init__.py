"""The training loop and what belongs to a run: schedule, resume, run folder, metrics, signals."""
