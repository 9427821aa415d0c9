"""LLaDA's masked diffusion objective (arXiv 2502.09992, Eq. 3 and appendix A).

For a segment of L maskable tokens (all of them in pretraining, the response in fine-tuning) at time
t:

* bernoulli: each token is masked with p = (1 - eps) t + eps, independently; a masked token's loss
  has weight 1 / p.
* fixed_count: exactly n = 1 + floor(t L) tokens are masked, uniformly without replacement; weight L
  / n. With t uniform, n is uniform on 1..L and the expected weighted sum is exactly the negative
  ELBO of the segment in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llada.noise import mask_uniforms
from llada.objectives.base import F64, I64, Corrupted, Window

Masked = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MaskedDiffusion:
    """Masks tokens of every segment at its own rate.

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
        """Mask one window. The draw of a position depends on (seed, sample, position) alone, so a
        change of segments or of t never re-deals the others' noise.

        Args:
            window: clean tokens, segments and their t.
            masking: override of `self.masking` (validation always uses "fixed_count").
            purpose: name of the noise: "train" or "validation".
        """
        draws = mask_uniforms(self.seed, window.sample, len(window.tokens), purpose)
        spans, scales = window.maskable()
        rule = self._fixed_count if (masking or self.masking) == "fixed_count" else self._bernoulli
        chosen, weights = rule(draws, spans, window.t)
        weights = _spread(scales * weights, spans, len(draws))
        predicted = (
            np.flatnonzero(chosen & (weights != 0))
            if (scales == 0).any()
            else np.flatnonzero(chosen)
        )
        inputs = window.tokens.copy()
        inputs[predicted] = self.mask_id
        return Corrupted(inputs=inputs, predicted=predicted, weights=weights[predicted])

    def expected_predictions(self, lengths: np.ndarray, t: np.ndarray) -> float:
        """Mean number of masked tokens in segments of so many maskable tokens at these t; for
        counting FLOPs ahead of the draw.
        """
        if self.masking == "fixed_count":
            return float(np.minimum(1 + np.floor(t * lengths), lengths).sum())
        return float((((1 - self.eps) * t + self.eps) * lengths).sum())

    # Both rules: draws [L], spans [n, 2] and t [n] of the segments -> which positions are masked,
    # bool [L], and the weight of a masked position of each segment, float64 [n].

    def _bernoulli(self, draws: F64, spans: I64, t: F64) -> tuple[Masked, F64]:
        p = (1 - self.eps) * t + self.eps
        return draws < _spread(p, spans, len(draws)), 1 / p

    def _fixed_count(self, draws: F64, spans: I64, t: F64) -> tuple[Masked, F64]:
        lengths = spans[:, 1] - spans[:, 0]
        counts = np.minimum(1 + (t * lengths).astype(np.int64), lengths)
        chosen = np.zeros(len(draws), dtype=bool)
        for (start, end), count in zip(spans.tolist(), counts.tolist(), strict=True):
            if start < end:
                chosen[start:end] = _smallest(draws[start:end], count)
        return chosen, lengths / np.maximum(counts, 1)


def _spread(values: F64, spans: I64, length: int) -> F64:
    """The value of its segment for each of `length` positions, 0 outside all spans; float64
    [length].

    Args:
        values: one a segment [n].
        spans: first and past-the-last position of each, ascending and disjoint, int64 [n, 2].
    """
    edges = np.concatenate([[0], spans.ravel(), [length]])
    pieces = np.zeros(len(edges) - 1)
    pieces[1::2] = values  # between the spans stay gaps of 0, most of them empty
    return np.repeat(pieces, np.diff(edges))


def _smallest(draws: F64, count: int) -> Masked:
    """Which are the `count` smallest; of equal draws the earlier ones."""
    chosen = draws <= np.partition(draws, count - 1)[count - 1]
    if np.count_nonzero(chosen) > count:
        chosen[:] = False
        chosen[np.argsort(draws, kind="stable")[:count]] = True
    return chosen
