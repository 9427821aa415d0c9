"""Comparing the settings of two runs."""

from __future__ import annotations

from typing import Any


def first_difference(
    old: dict[str, Any], new: dict[str, Any], allowed: tuple[str, ...], prefix: str = ""
) -> str | None:
    """The first setting that differs between two nested configs, as `key: old -> new`; `allowed`
    prefixes may differ.
    """
    for key in {**old, **new}:
        path = f"{prefix}{key}"
        if any(path == a or path.startswith(a + ".") for a in allowed):
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found = first_difference(before, after, allowed, path + ".")
            if found:
                return found
        elif before != after:
            return f"{path}: {before!r} -> {after!r}"
    return None
