"""Types that several packages share. Standard library only."""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""A parsed JSON or YAML mapping whose values are looked at one by one."""
