"""The plan of one training step: which instances it reads, and how each is cut, timed and weighted.

A plan follows from the step's index alone: it is known before any token is read, on every rank
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llada.arrays import F64, I64
from llada.objectives import NoiseGroups

DrawT = Callable[[I64, I64], F64]
"""(row of each noise group in the plan, a number that groups of one text share) -> t of each."""


@dataclass(frozen=True)
class StepPlan:
    """Samples, attention segments and noise groups of one global step, or of one validation.

    A sample is one row of the batch: an example (a window of text, or a reply with its prompt) of a
    corpus, cut into attention segments. Its noise groups are what may be corrupted in it.

    A pretraining step of two samples of 8 tokens, the first cut after 3 tokens:

        samples         [40, 41]
        corpora         [0, 1]              the mixture's first and second corpus
        examples        [17, 5]             window 17 of the one, window 5 of the other
        bounds          [[0, 3, 8], [0, 8]]
        attended        [3, 5, 8]           lengths of the segments
        rows            [0, 0, 1]           groups 0 and 1 are in row 0, group 2 in row 1
        groups.spans    [[0, 3], [3, 8], [0, 8]]
        groups.scales   [1, 1, 1]
        groups.t        [0.09, 0.34, 0.75]

    The t are strata of [0, 1) (`llada.noise.timesteps`), here in the order 8, 3, 5 tokens with an
    offset of 0.5.

    In fine-tuning, a row with a prompt of 2 tokens, a response up to position 6 and 2 tokens of
    filler has the bounds [0, 6, 8], one segment of 6 tokens that counts, and one group of the span
    [2, 6] and the scale 1 / 4.

    Attributes:
        samples: global sample indices [n].
        corpora: corpus of each sample, its index in data.mixture [n].
        examples: number of each sample's window or reply in its corpus [n].
        bounds: segment boundaries of each sample's row.
        attended: tokens of every segment that is not filler [segments].
        rows: row of every noise group, ascending [g].
        groups: all noise groups [g].
    """

    samples: I64
    corpora: I64
    examples: I64
    bounds: list[I64]
    attended: I64
    rows: I64
    groups: NoiseGroups

    @property
    def tokens(self) -> int:
        """Tokens of the step without filler."""
        return int(self.attended.sum())

    def groups_of(self, row: int) -> NoiseGroups:
        """Return the noise groups of a row."""
        first, last = np.searchsorted(self.rows, [row, row + 1]).tolist()
        return self.groups[first:last]
