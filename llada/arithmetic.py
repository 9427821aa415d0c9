"""Integer arithmetic that the standard library lacks."""

from __future__ import annotations


def ceil_div(numerator: int, denominator: int) -> int:
    """Return numerator / denominator, rounded up: ceil_div(7, 2) is 4."""
    return -(-numerator // denominator)
