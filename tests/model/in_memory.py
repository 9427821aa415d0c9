"""Canonical tensors in memory, behind the interface that streams them."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class InMemory:
    """`llada.model.weights.Weights` from a dict."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self.tensors[name][first:last].clone()
