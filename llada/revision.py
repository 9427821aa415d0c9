"""Which version of the code is running."""

from __future__ import annotations

import subprocess
from pathlib import Path

FILE = "REVISION"
"""Beside the packages in a snapshot of the code: the revision it was taken from."""


def of_code() -> str | None:
    """Git revision of the code that runs, with -dirty for uncommitted changes; None outside a
    checkout.
    """
    root = Path(__file__).resolve().parents[1]
    snapshot = root / FILE
    if snapshot.is_file():  # it lies in a run folder, and that perhaps in another checkout
        return snapshot.read_text(encoding="utf-8").strip() or None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return (
            subprocess.run(
                command, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None
