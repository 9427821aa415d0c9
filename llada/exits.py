"""Exit codes of the commands and of a run's ranks. Standard library only."""

from __future__ import annotations

FINISHED = 0
FAILED = 1
USER_ERROR = 2
"""A user error: the same command fails again."""
RESTART = 75
"""Not finished, and nothing is wrong: the same command continues."""
INTERRUPTED = 130
"""Ctrl-C."""
