"""Types that several parts of the package share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Advance: TypeAlias = Callable[[int, int, int], None]
"""Reports progress: bytes of text, tokens, and things left out, since the last call."""
