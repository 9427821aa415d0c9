"""Tests marked `gpu` are skipped where there is no CUDA device; CI accepts no other skip (see .ci/run)."""

from __future__ import annotations

import pytest

from tests.workplace import workplace  # noqa: F401  (a fixture of several packages' tests)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device"))
