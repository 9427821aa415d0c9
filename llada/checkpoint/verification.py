"""Whether the files of a checkpoint are those that its marker describes."""

from __future__ import annotations

import json
from pathlib import Path

from llada.checkpoint.names import MARKER
from llada.files import checksum


def verify_checkpoint(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """Compare the files of a committed checkpoint with its marker.

    Args:
        folder: the checkpoint.
        share, shares: check every `shares`-th file, starting with number `share`. So rank r of n
            passes (r, n), and the ranks divide the reading among themselves.

    Returns:
        One line for each difference.
    """
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / MARKER} is damaged ({error})"]
    problems = []
    for name, recorded in sorted(files.items())[share::shares]:
        path = folder / name
        try:
            size = path.stat().st_size
            # The size first: it costs nothing, and a truncated file is the usual damage.
            if size != recorded["bytes"]:
                problems.append(f"{path} has {size} bytes, its marker says {recorded['bytes']}")
            elif checksum(path) != recorded:
                problems.append(f"{path} has another checksum than its marker says")
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
    return problems
