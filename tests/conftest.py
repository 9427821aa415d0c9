"""Tests compute on the CPU, also where there is a GPU; those marked `gpu` are for `pytest -m gpu`.

The latter are skipped where there is no CUDA device, and CI accepts no other skip (see .ci/run).
"""

from __future__ import annotations

import os

import pytest

from llada import device
from tests.workplace import workplace  # noqa: F401  (a fixture of several packages' tests)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ.setdefault(device.VARIABLE, "cpu")
        device.hide_unwanted_gpus()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device"))
