"""What torchrun is told of an end that is no failure: to it every exit code but 0 is one, and it
then prints 50 lines of its own.

Standard library only.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def explain_exit(message: str) -> None:
    """Make `message` what torchrun prints last, as the root cause; without torchrun nothing
    happens.
    """
    path = os.environ.get(_ERROR_FILE)
    if not path:
        return
    # As torch.distributed.elastic's own ErrorHandler writes it.
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with (
        suppress(OSError),
        open(path, "w", encoding="utf-8") as file,
    ):  # it changes a message, so it must not change an exit code
        json.dump(content, file)
