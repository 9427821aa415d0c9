"""Engines own the model, the optimizer and parallelism, and know nothing of masks."""
