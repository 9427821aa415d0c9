"""Locks of run folders that no process of the test wrote."""

from __future__ import annotations

import json
from pathlib import Path

from llada.training import lock


def forge_lock(folder: Path, **fields: object) -> None:
    """Write the lock of a process on another machine, with other `fields` where they are given."""
    holder = {"host": "elsewhere", "pid": 1, "born": None, "job": None, "attempt": None}
    (folder / lock.NAME).write_text(json.dumps({**holder, **fields}))
