"""What an objective makes of a row: what the model reads, and the terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from llada.arrays import F64, I64
from llada.objectives.layout import Layout

TOKENS = "tokens"
"""The head whose width is the vocabulary; all models have it."""


@dataclass(frozen=True)
class Terms:
    """Terms of the loss that one head computes.

    A term is not a position of the row: a position may have none, one, or several.

    Attributes:
        positions: where the head reads the model's state, int64 [n].
        targets: the token id that each term is about, int64 [n].
        weights: factor on the loss of each term, float64 [n].
        groups: number in the step of the noise group of each term, int64 [n].
        aux: whatever else the loss needs of each term, by name, [n] each.
    """

    positions: I64
    targets: I64
    weights: F64
    groups: I64
    aux: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, chosen: slice) -> Terms:
        return Terms(
            positions=self.positions[chosen],
            targets=self.targets[chosen],
            weights=self.weights[chosen],
            groups=self.groups[chosen],
            aux={name: values[chosen] for name, values in self.aux.items()},
        )


@dataclass(frozen=True)
class Corrupted:
    """A row after corruption. M is `Objective.input_length` of its L tokens.

    Attributes:
        inputs: token ids that the model reads, int64 [M].
        positions: rotary position of each of them, int64 [M].
        layout: which of them see which, of this one row.
        terms: of the loss, by head.
    """

    inputs: I64
    positions: I64
    layout: Layout
    terms: Mapping[str, Terms]

    def without_terms(self) -> Corrupted:
        """Return the same row without a loss: filler of a micro-batch."""
        return replace(self, terms={head: terms[:0] for head, terms in self.terms.items()})
