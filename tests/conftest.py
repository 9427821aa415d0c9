"""What all tests share: the device, the order, the fork server, and scratch folders in memory.

Tests compute on the CPU even if there is a GPU. Those marked `gpu` run with `pytest -m gpu`, and
are skipped without a CUDA device; CI accepts no other skip (see .ci/run).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before torch is imported, which reads them. Tests run side by side on few cores: a waiting thread
# must not spin, and a run that needs two threads sets run.threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from llada import device
from tests.processes import SERVER, fork_server
from tests.workplace import workplace  # noqa: F401  (a fixture that tests of several packages use)

# A busy machine is no reason to fail: by default, hypothesis limits how long an example, and making
# examples, may take.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

MEMORY = Path("/dev/shm")
ROOM = 6 << 30
"""Bytes: several times what the whole suite writes."""
LONGEST = (
    "distributed",
    "training",
    "checkpoint",
    "evaluation",
    "mutations",
    "hf",
    "engine",
    "data_tools",
    "sampling",
)
"""Folders with the longest tests, which start first, so that the workers end together."""


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell makes commands in the background ignore Ctrl-C, and the programs that tests start
        # would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    on_gpu = config.option.markexpr == "gpu"
    if not on_gpu:
        os.environ.setdefault(device.VARIABLE, "cpu")
        device.hide_unwanted_gpus()
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist uses the server of the process that started it
    if not on_gpu:  # CUDA does not work in a fork
        held = contextlib.ExitStack()
        config.add_cleanup(held.close)
        os.environ[SERVER] = held.enter_context(fork_server())
    if has_room(MEMORY):
        # Flushing to a disk takes milliseconds, and the tests flush thousands of times.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def has_room(folder: Path) -> bool:
    """Whether scratch folders fit into a file system that may hold programs."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    return status.f_bavail * status.f_frsize >= ROOM and not status.f_flag & os.ST_NOEXEC


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=start_order)
    skip_without_gpu([item for item in items if item.get_closest_marker("gpu")])


def pytest_collection_finish() -> None:
    """Exempt the imported libraries from garbage collection: going through them takes 0.4 s, and
    every engine begins with a collection.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Decide which tests must run in one worker of pytest-xdist.

    The tests of a file share its fixtures, and all distributed tests share a pool of ranks. Planted
    mistakes and sequences of kills share nothing, and take long.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            name = Path(path).parent.name
            if name == "mutations" or path.endswith("training/test_faults.py"):
                return nodeid
            if name == "distributed":
                return name
            return path

    return ByFile(config, log)


def start_order(item: pytest.Item) -> int:
    """The index of the item's folder in LONGEST; all other folders come last."""
    folder = item.path.parent.name
    if folder in LONGEST:
        return LONGEST.index(folder)
    return len(LONGEST)


def skip_without_gpu(items: list[pytest.Item]) -> None:
    if not items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device"))
