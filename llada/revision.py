"""Which version of the code is running."""

from __future__ import annotations

import subprocess
from pathlib import Path

FILE = "REVISION"
"""In a snapshot of the code, beside the packages: the revision that it was taken from."""


def of_code() -> str | None:
    """Git revision of the running code, with -dirty for uncommitted changes; None if unknown."""
    root = Path(__file__).resolve().parents[1]
    # Before git: a snapshot lies in a run folder, which may itself lie in some other checkout.
    snapshot = root / FILE
    if snapshot.is_file():
        return snapshot.read_text(encoding="utf-8").strip() or None
    # --exclude=* ignores all tags, so that the result is a plain hash.
    options = ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", *options],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or a slow disk
        return None
    return result.stdout.strip() or None
