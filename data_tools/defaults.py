"""Defaults that several commands share."""

from __future__ import annotations

SHARD_TOKENS = 2**28
"""Number of tokens with which a shard is full."""
VALIDATION_FRACTION = 0.005
"""Share of the documents that is held out for validation."""
