"""Stand-ins for what a test cannot have for real."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any


def like(module: ModuleType, **changes: Any) -> Any:
    """A copy of a module with some names changed, to be put where one module of ours looks for it.

    The module itself stays as it is for everybody else in this process, as subprocess and pytest.
    """
    return SimpleNamespace(**{**vars(module), **changes})
