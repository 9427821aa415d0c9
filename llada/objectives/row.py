"""A row of clean tokens, and the noise groups that say what is corrupted in it and how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from llada.arrays import F64, I64
from llada.noise import mask_uniforms


class Key(NamedTuple):
    """What a draw depends on, apart from its sample and position.

    Attributes:
        seed: of the run; validation has one of its own, the same in all runs.
        purpose: "train", or the name of a validation.
    """

    seed: int
    purpose: str = "train"


@dataclass(frozen=True)
class NoiseGroups:
    """Spans of tokens that are corrupted, each with a diffusion time of its own.

    What shares a t is not what attends together: a group may be a part of an attention segment, and
    a row may have tokens in no group (a prompt, filler), which are never corrupted.

    Nor is it what keys the noise. The draws of a position are those of (sample, position - origin),
    so a sample that stands in the middle of a row gets the noise that it gets alone.

    Example: a row with two conversations of 6 and 10 tokens, whose responses are the last 4 and 7.

        ids      [20, 21]            the step's groups 20 and 21
        spans    [[2, 6], [9, 16]]
        samples  [40, 41]
        origins  [0, 6]              position 9 has the noise of position 3 of sample 41
        t        [0.09, 0.34]
        scales   [1 / 4, 1 / 7]

    Attributes:
        ids: numbers of the groups in the step, int64 [g].
        spans: first and past-the-last position of each group in its row, ascending and disjoint
            within a row, int64 [g, 2].
        samples: global sample index of each group, int64 [g].
        origins: position in the row of the first token of each group's sample, int64 [g].
        t: diffusion time of each group in [0, 1), float64 [g].
        scales: factor on the weights of each group, float64 [g].
    """

    ids: I64
    spans: I64
    samples: I64
    origins: I64
    t: F64
    scales: F64

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: slice) -> NoiseGroups:
        return NoiseGroups(
            ids=self.ids[chosen],
            spans=self.spans[chosen],
            samples=self.samples[chosen],
            origins=self.origins[chosen],
            t=self.t[chosen],
            scales=self.scales[chosen],
        )

    @classmethod
    def of_whole_samples(
        cls, samples: I64, spans: I64, t: F64, scales: F64 | None = None
    ) -> NoiseGroups:
        """Return groups of samples that begin at the first position of their rows.

        Args:
            samples: sample of each group, int64 [g].
            spans: of each group, int64 [g, 2].
            t: of each group, float64 [g].
            scales: of each group, float64 [g]; None: 1.
        """
        count = len(spans)
        return cls(
            ids=np.arange(count, dtype=np.int64),
            spans=spans,
            samples=samples,
            origins=np.zeros(count, dtype=np.int64),
            t=t,
            scales=np.ones(count) if scales is None else scales,
        )

    @property
    def sizes(self) -> I64:
        """Tokens of each group, int64 [g]."""
        return self.spans[:, 1] - self.spans[:, 0]


@dataclass(frozen=True)
class Row:
    """Clean tokens of one row of a batch.

    Attributes:
        tokens: [L] int64.
        bounds: boundaries 0 = b_0 < ... < b_n = L of the attention segments, int64 [n + 1].
        groups: the row's noise groups.
    """

    tokens: I64
    bounds: I64
    groups: NoiseGroups

    def position_uniforms(self, key: Key) -> F64:
        """Draw one uniform in [0, 1) for each position of a group, float64 [L].

        The draw of a position depends on the key, its sample and its place in the sample, and not
        on how the row is cut. Positions before, between and behind the samples have 1.
        """
        groups = self.groups
        draws = np.ones(len(self.tokens))
        for first, last in _runs(groups.samples):
            origin = int(groups.origins[first])
            stop = int(groups.spans[last - 1, 1])
            sample = int(groups.samples[first])
            draws[origin:stop] = mask_uniforms(key.seed, sample, stop - origin, key.purpose)
        return draws


def _runs(values: I64) -> Iterator[tuple[int, int]]:
    """First and past-the-last index of each run of equal values: (0, 2), (2, 3) of [4, 4, 7]."""
    changes = np.flatnonzero(np.diff(values)) + 1
    if len(values):
        yield from pairwise([0, *changes.tolist(), len(values)])
