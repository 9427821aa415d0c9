"""Defaults that several commands share."""

from __future__ import annotations

SHARD_TOKENS = 2**28
"""Tokens of a full shard."""
VALIDATION_FRACTION = 0.005
"""Share of the documents that are held out for validation."""
