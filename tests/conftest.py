"""What all tests share: the device, order and grouping for pytest-xdist, a server of forked programs, scratch folders in memory.

Tests compute on the CPU, also where there is a GPU; those marked `gpu` are for `pytest -m gpu`. The latter are skipped where there is
no CUDA device, and CI accepts no other skip (see .ci/run).
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Read when torch is imported. Tests run side by side on few cores: a thread that waits must not spin, and a run that is to have
# two threads says so (run.threads).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from llada import device
from tests.processes import SERVER, fork_server
from tests.workplace import workplace  # noqa: F401  (a fixture of several packages' tests)

# A busy machine is no reason to fail: without this, an example or the making of examples may take only so long.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

MEMORY = Path("/dev/shm")
ROOM = 6 << 30
"""Bytes: what the whole suite writes, several times over."""
LONGEST = ("distributed", "training", "mutations", "hf", "engine", "data_tools", "sampling")
"""Folders whose tests start first, so that the workers end together."""


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell that starts a command in the background has it ignore Ctrl-C, and with it every program that a test starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    on_gpu = config.option.markexpr == "gpu"
    if not on_gpu:
        os.environ.setdefault(device.VARIABLE, "cpu")
        device.hide_unwanted_gpus()
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist: all share what the process that started them holds
    if not on_gpu:  # a fork has no use of CUDA
        held = contextlib.ExitStack()
        config.add_cleanup(held.close)
        os.environ[SERVER] = held.enter_context(fork_server())
    if has_room(MEMORY):
        # What is written for good is flushed, which takes a disk milliseconds, thousands of times.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def has_room(folder: Path) -> bool:
    """Whether scratch folders fit there and may hold programs."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    return status.f_bavail * status.f_frsize >= ROOM and not status.f_flag & os.ST_NOEXEC


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(folder(item)) if folder(item) in LONGEST else len(LONGEST))
    skip_without_gpu([item for item in items if item.get_closest_marker("gpu")])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests one worker of pytest-xdist runs: those of a file, which share its fixtures, and all distributed ones, which share a
    pool of ranks. Planted mistakes share nothing."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            name = Path(path).parent.name
            if name == "mutations":
                return nodeid
            return name if name == "distributed" else path

    return ByFile(config, log)


def folder(item: pytest.Item) -> str:
    return item.path.parent.name


def skip_without_gpu(items: list[pytest.Item]) -> None:
    if not items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device"))
