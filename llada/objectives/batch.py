"""The micro-batch that goes to the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llada.objectives.corrupted import Corrupted, Terms
from llada.objectives.layout import Layout


@dataclass(frozen=True)
class BatchTerms:
    """Terms of the loss of a micro-batch, sorted by (column, row), the order of [s, b] tensors.

    Several terms may share a position; they keep the order in which the objective gave them.

    Attributes:
        rows, columns: where the head reads the model's state, int64 [n].
        targets: the token id that each term is about, int64 [n].
        weights: factor on the loss of each term, float32 [n].
        groups: number in the step of the noise group of each term, int64 [n].
        aux: whatever else the loss needs of each term, by name, [n] each.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    groups: torch.Tensor
    aux: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One micro-batch on CPU, complete; the engine takes the part of each rank.

    Attributes:
        inputs: [b, M] int64.
        positions: [M] int64, rotary positions, the same in all rows.
        layout: attention segments.
        terms: of the loss, by head.
        normalizer: divides the sum of the weighted losses; the same in all micro-batches of a step.
            None in a validation, which adds up by noise group and divides nothing.
    """

    inputs: torch.Tensor
    positions: torch.Tensor
    layout: Layout
    terms: Mapping[str, BatchTerms]
    normalizer: float | None = None


def collate(rows: Sequence[Corrupted], normalizer: float | None = None) -> Batch:
    """Stack corrupted rows of equal length and positions into a Batch."""
    first = rows[0]
    return Batch(
        inputs=torch.from_numpy(np.stack([row.inputs for row in rows])),
        positions=torch.from_numpy(first.positions),
        layout=Layout.stack([row.layout for row in rows]),
        terms={head: _stack([row.terms[head] for row in rows]) for head in first.terms},
        normalizer=normalizer,
    )


def _stack(terms: Sequence[Terms]) -> BatchTerms:
    """Sort the terms of all rows by column and then by row."""
    # Each array has one entry for every term of the micro-batch, row after row.
    counts = [len(of_row.positions) for of_row in terms]
    rows = np.repeat(np.arange(len(terms), dtype=np.int64), counts)
    columns = np.concatenate([of_row.positions for of_row in terms])
    # Stable: terms at one position keep their order.
    order = np.argsort(columns * len(terms) + rows, kind="stable")

    def join(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)[order])

    names = terms[0].aux
    return BatchTerms(
        rows=torch.from_numpy(rows[order]),
        columns=torch.from_numpy(columns[order]),
        targets=join([of_row.targets for of_row in terms]),
        weights=join([of_row.weights.astype(np.float32) for of_row in terms]),
        groups=join([of_row.groups for of_row in terms]),
        aux={name: join([of_row.aux[name] for of_row in terms]) for name in names},
    )
