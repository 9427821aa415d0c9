"""Kernels and collectives that give the same bits every time, for run.deterministic on a GPU."""

from __future__ import annotations

import os

import torch


def use_deterministic_algorithms() -> None:
    """Make torch, cuBLAS and NCCL repeat every sum in the same order; before the first of their
    calls on a GPU.

    Variables that are set already stay.
    """
    # cuBLAS: no workspace shared between streams
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # NCCL otherwise chooses by message size and topology
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # By default new tensors are filled as well: a search for bugs that costs a pass over each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
