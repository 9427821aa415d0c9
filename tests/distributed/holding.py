"""What every rank does in the test of holding a run folder; they import it by its full name."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from llada.errors import UserError
from llada.training.run_folder import hold_run_folder


def hold_and_release(path: Path) -> tuple[bool, str]:
    """Return whether this rank held the folder, and the message if it was refused."""
    try:
        held = hold_run_folder(path, dist.get_rank(), lambda: False)
    except UserError as error:
        return False, str(error)
    if held is not None:
        held.release()
    return held is not None, ""
