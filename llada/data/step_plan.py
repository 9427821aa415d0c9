"""The plan of one training step: which instances it reads, and how each is cut, timed and weighted.

A plan follows from the step's index alone: it is known before any token is read, on every rank
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llada.arrays import F64, I64

DrawT = Callable[[I64, I64], F64]
"""(row of each segment in the plan, a number that segments of the same text share) -> t of each."""


@dataclass(frozen=True)
class StepPlan:
    """Samples and segments of one global step, or of one validation.

    A sample is one row of the batch: an example (a window of text, or a reply with its prompt) of a
    corpus, cut into attention segments.

    A pretraining step of two samples of 8 tokens, the first cut after 3 tokens:

        samples         [40, 41]
        corpora         [0, 1]              the mixture's first and second corpus
        examples        [17, 5]             window 17 of the one, window 5 of the other
        bounds          [[0, 3, 8], [0, 8]]
        first_segments  [0, 2, 3]           segments 0 and 1 are in row 0, segment 2 in row 1
        spans           [[0, 3], [3, 8], [0, 8]]
        scales          [1, 1, 1]
        t               [0.09, 0.34, 0.75]

    The t are strata of [0, 1) (`llada.noise.timesteps`), here in the order 8, 3, 5 tokens with an
    offset of 0.5.

    In fine-tuning, a row with a prompt of 2 tokens, a response up to position 6 and 2 tokens of
    filler has the bounds [0, 6, 8], the spans [[2, 6], [8, 8]] and the scales [1 / 4, 0].

    Attributes:
        samples: global sample indices [n].
        corpora: corpus of each sample, its index in data.mixture [n].
        examples: number of each sample's window or reply in its corpus [n].
        bounds: segment boundaries of each sample's row.
        first_segments: id of each sample's first segment [n + 1]; segments are numbered through the
            step.
        spans: first and past-the-last position of every segment's noise group, the tokens that may
            be masked and share its t [segments, 2]; empty for filler.
        scales: factor on the weights of every segment [segments].
        t: diffusion time of every segment [segments].
    """

    samples: I64
    corpora: I64
    examples: I64
    bounds: list[I64]
    first_segments: I64
    spans: I64
    scales: F64
    t: F64

    @property
    def maskable(self) -> I64:
        """Tokens of every segment that may be masked [segments]; 0 for filler."""
        return self.spans[:, 1] - self.spans[:, 0]

    @property
    def lengths(self) -> I64:
        """Tokens of every segment [segments]."""
        return np.concatenate([np.diff(row_bounds) for row_bounds in self.bounds])

    @property
    def counted(self) -> I64:
        """Tokens of every segment that is not filler."""
        return self.lengths[self.maskable > 0]

    @property
    def tokens(self) -> int:
        """Tokens of the step without filler."""
        return int(self.counted.sum())
