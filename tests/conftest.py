"""Tests marked `gpu` are skipped where there is no CUDA device; CI accepts no other skip (see .ci/run). Programs that tests start
are forked from one process, if they do not ask for a new one (tests/processes.py)."""

from __future__ import annotations

import contextlib
import os

import pytest

from tests.processes import SERVER, fork_server
from tests.workplace import workplace  # noqa: F401  (a fixture of several packages' tests)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist: all share the server of the process that started them
    held = contextlib.ExitStack()
    os.environ[SERVER] = held.enter_context(fork_server())
    config.add_cleanup(held.close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device"))
