"""Canonical tensors assembled from the shards of ranks, the inverse of `weights.scatter`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from llada.config.sections import ModelSection
from llada.model import weights


def gather(
    model: ModelSection, shards: Iterable[tuple[Mapping[str, torch.Tensor], int, int]]
) -> dict[str, torch.Tensor]:
    """Assemble canonical tensors from the Megatron tensors (weights or gradients) of some ranks.

    Args:
        model: shape of the model.
        shards: (tensors by global Megatron name, tp_rank, tp_size) of each rank.

    Returns:
        Every canonical tensor that a shard touches; what no shard holds of it is NaN.
    """
    shapes = weights.canonical_shapes(model)
    whole: dict[str, torch.Tensor] = {}
    for tensors, tp_rank, tp_size in shards:
        for name, tensor in tensors.items():
            for rectangle in weights.pieces(model, name, tp_rank, tp_size):
                if rectangle.name not in whole:
                    shape = shapes[rectangle.name]
                    whole[rectangle.name] = torch.full(shape, float("nan"), dtype=tensor.dtype)
                target = whole[rectangle.name][slice(*rectangle.rows)]
                if rectangle.columns is not None:
                    target = target[:, slice(*rectangle.columns)]
                num_rows = rectangle.rows[1] - rectangle.rows[0]
                target.copy_(tensor[rectangle.local_row : rectangle.local_row + num_rows])
    return whole
