"""Sizes for people, and reading ahead; what else llada.files does is tested with the checkpoints
that it writes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llada.formatting import readable_size


def test_readable_sizes() -> None:
    assert [readable_size(n) for n in (0, 999, 999_600, 12_345, 1.12e11, 4.9e13, 1e20)] == [
        "0 bytes",
        "999 bytes",
        "1 MB",
        "12.3 kB",
        "112 GB",
        "49 TB",
        "1e+05 PB",
    ]


ABANDONED = """
import threading
from llada.files import prefetch

results = prefetch(lambda: 1 for _ in range(9))
assert next(results) == 1
# Where the garbage collector once ran: a thread that starts holds this lock.
with threading._shutdown_locks_lock:
    del results
print("ended")
"""


def test_results_that_nobody_asks_for_block_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "ended\n", done.stderr
