"""How a rank explains its end to torchrun.

To torchrun every exit code but 0 is a failure, about which it prints 50 lines of its own. A message
in the file that it names is at the end. Standard library only.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable with the path of that file; set by torchrun."""


def explain_exit(message: str) -> None:
    """Make `message` the root cause that torchrun prints last. Do nothing without torchrun."""
    path = os.environ.get(_ERROR_FILE)
    if not path:
        return
    # The format of torch.distributed.elastic's own ErrorHandler.
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    # A full disk may cost the message, but must not change the exit code.
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
