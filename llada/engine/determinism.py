"""Kernels and collectives that give the same bits every time (run.deterministic on a GPU)."""

from __future__ import annotations

import os

import torch


def use_deterministic_algorithms() -> None:
    """Make torch, cuBLAS and NCCL add in the same order every time.

    Must be called before their first use on a GPU. Variables that are set already are kept.
    """
    # cuBLAS is deterministic only if streams do not share a workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # NCCL otherwise chooses an algorithm by message size and topology.
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # torch would also fill new tensors, to make reads of uninitialized memory visible. That costs a
    # pass over each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
