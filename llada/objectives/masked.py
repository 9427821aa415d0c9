"""LLaDA's masked diffusion objective (arXiv 2502.09992, Eq. 3 and appendix A).

A segment has L maskable tokens (all of them in pretraining, the response in fine-tuning) and a time
t. There are two ways to mask it:

* bernoulli: each token is masked independently with probability p = (1 - eps) t + eps; the loss of
  a masked token has weight 1 / p.
* fixed_count: exactly n = 1 + floor(t L) tokens are masked, uniformly without replacement, with
  weight L / n. With t uniform, n is uniform on 1..L, and the expected weighted sum is exactly the
  negative ELBO of the segment in nats.

Example: L = 4, t = 0.6. bernoulli masks each token with p = 0.6004 and weight 1.666; fixed_count
masks n = 1 + floor(2.4) = 3 of the four tokens with weight 4 / 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llada.arrays import F64, I64
from llada.noise import mask_uniforms
from llada.objectives.base import Corrupted, Window

Masked = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MaskedDiffusion:
    """Masks the tokens of every segment at the segment's own rate.

    Attributes:
        seed: key of the masks.
        mask_id: token id of [MASK].
        masking: "bernoulli" or "fixed_count".
        eps: smallest masking probability of bernoulli.
    """

    seed: int
    mask_id: int
    masking: str = "bernoulli"
    eps: float = 1e-3
    token_loss: str = "cross_entropy"

    def corrupt(
        self, window: Window, *, masking: str | None = None, purpose: str = "train"
    ) -> Corrupted:
        """Mask one window; the arguments are those of `Objective.corrupt`.

        The draw of a position depends on (seed, sample, position) only, so another segmentation or
        another t leaves the noise of all positions as it is.
        """
        # One uniform for every position, whether it may be masked or not.
        draws = mask_uniforms(self.seed, window.sample, len(window.tokens), purpose)
        spans, scales = window.maskable()
        if (masking or self.masking) == "fixed_count":
            chosen, weights = self._fixed_count(draws, spans, window.t)
        else:
            chosen, weights = self._bernoulli(draws, spans, window.t)
        weights = _spread(scales * weights, spans, len(draws))

        # A segment of scale 0 adds nothing to the loss: it is not masked at all.
        if (scales == 0).any():
            chosen = chosen & (weights != 0)
        predicted = np.flatnonzero(chosen)
        inputs = window.tokens.copy()
        inputs[predicted] = self.mask_id
        return Corrupted(inputs=inputs, predicted=predicted, weights=weights[predicted])

    def expected_predictions(self, lengths: np.ndarray, t: np.ndarray) -> float:
        """Mean number of masked tokens; the arguments are those of `Objective`."""
        if self.masking == "fixed_count":
            return float(np.minimum(1 + np.floor(t * lengths), lengths).sum())
        return float((((1 - self.eps) * t + self.eps) * lengths).sum())

    # Both rules take draws [L], and spans [n, 2] and t [n] of the segments. They return which
    # positions are masked, bool [L], and the weight of a masked position in each segment, float64
    # [n].

    def _bernoulli(self, draws: F64, spans: I64, t: F64) -> tuple[Masked, F64]:
        p = (1 - self.eps) * t + self.eps
        return draws < _spread(p, spans, len(draws)), 1 / p

    def _fixed_count(self, draws: F64, spans: I64, t: F64) -> tuple[Masked, F64]:
        lengths = spans[:, 1] - spans[:, 0]
        # t L may round up to L for t just below 1, which would give L + 1.
        counts = np.minimum(1 + (t * lengths).astype(np.int64), lengths)
        chosen = np.zeros(len(draws), dtype=bool)
        for (start, stop), count in zip(spans.tolist(), counts.tolist(), strict=True):
            if start < stop:
                chosen[start:stop] = _smallest(draws[start:stop], count)
        # An empty span has count 0; its weight is never used.
        return chosen, lengths / np.maximum(counts, 1)


def _spread(values: F64, spans: I64, length: int) -> F64:
    """Give every position the value of its segment, and 0 outside all spans; float64 [length].

    Example: values (5, 7), spans (1, 3) and (3, 4), length 6. The edges are 0, 1, 3, 3, 4, 6, the
    values between them 0, 5, 0, 7, 0, and the result is 0, 5, 5, 7, 0, 0.

    Args:
        values: one per segment [n].
        spans: [start, stop) of each segment, ascending and disjoint, int64 [n, 2].
        length: number of positions.
    """
    edges = np.concatenate([[0], spans.ravel(), [length]])
    # Spans and the gaps around them alternate; most gaps are empty.
    between_edges = np.zeros(len(edges) - 1)
    between_edges[1::2] = values
    return np.repeat(between_edges, np.diff(edges))


def _smallest(draws: F64, count: int) -> Masked:
    """Which draws are the `count` smallest, bool [n]; of equal ones the earlier."""
    # A partition instead of a sort: linear, and ties are practically impossible.
    chosen = draws <= np.partition(draws, count - 1)[count - 1]
    if np.count_nonzero(chosen) > count:
        chosen[:] = False
        chosen[np.argsort(draws, kind="stable")[:count]] = True
    return chosen
