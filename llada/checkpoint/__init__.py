"""Checkpoints: their format on disk, saving while training goes on, and reading."""
