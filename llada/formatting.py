"""Quantities and lists as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def readable_size(count: float) -> str:
    """A number of bytes with three digits and a decimal unit: 870 bytes, 1.05 MB, 14.2 GB."""
    size = count
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size < 999.5:  # what prints as 1000 is 1 of the next unit
            break
        size /= 1000
        unit = larger
    return f"{size:.3g} {unit}"


def first_of(problems: Sequence[str]) -> str:
    """The first of at least one problem, and the number of the others."""
    if len(problems) == 1:
        return problems[0]
    return f"{problems[0]} (and {len(problems) - 1} more)"


def clock_time(seconds: float) -> str:
    """A duration as hours:minutes:seconds: 0:01:01."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
