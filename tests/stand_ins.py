"""Stand-ins for what a test cannot have, such as a full disk."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any


def like(module: ModuleType, **changes: Any) -> Any:
    """A copy of a module with some names replaced, to patch into one module of ours.

    The module itself stays as it is for everything else in this process: pytest, subprocess,
    threads. Example: `monkeypatch.setattr("llada.outputs.os", like(os, link=no_links))`.
    """
    return SimpleNamespace(**{**vars(module), **changes})
