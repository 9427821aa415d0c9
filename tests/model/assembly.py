"""Canonical tensors put together from the Megatron tensors of several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from llada.config.sections import ModelSection
from llada.model.weights import canonical_shapes, rectangles


def gather(
    model: ModelSection, shards: Iterable[tuple[Mapping[str, torch.Tensor], int, int]]
) -> dict[str, torch.Tensor]:
    """Assemble canonical tensors from the Megatron tensors (weights or gradients) of any ranks.

    Elements that no rank holds are NaN.

    Args:
        model: Shape of the model.
        shards: (tensors by global Megatron name, tp_rank, tp_size) of each rank.
    """
    shapes = canonical_shapes(model)
    assembled: dict[str, torch.Tensor] = {}
    for tensors, tp_rank, tp_size in shards:
        for name, tensor in tensors.items():
            for rectangle in rectangles(model, name, tp_rank, tp_size):
                whole = assembled.setdefault(
                    rectangle.name,
                    torch.full(shapes[rectangle.name], float("nan"), dtype=tensor.dtype),
                )
                target = whole[slice(*rectangle.rows)]
                if rectangle.columns is not None:
                    target = target[:, slice(*rectangle.columns)]
                target.copy_(tensor[rectangle.local_row : rectangle.local_row + len(target)])
    return assembled
