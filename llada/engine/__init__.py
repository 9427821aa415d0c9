"""Engines: they own model, optimizer and parallelism, and know nothing of masks."""
