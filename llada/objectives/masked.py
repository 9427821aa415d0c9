"""LLaDA's masked diffusion objective (arXiv 2502.09992, Eq. 3 and appendix A).

For a segment of L maskable tokens (all of them in pretraining, the response in fine-tuning) at time t:

* bernoulli: each token is masked with p = (1 - eps) t + eps, independently; a masked token's loss has weight 1 / p.
* fixed_count: exactly n = 1 + floor(t L) tokens are masked, uniformly without replacement; weight L / n. With t uniform, n is
  uniform on 1..L and the expected weighted sum is exactly the negative ELBO of the segment in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llada.noise import mask_uniforms
from llada.objectives.base import Corrupted, Window


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

    def corrupt(self, window: Window, *, masking: str | None = None, purpose: str = "train") -> Corrupted:
        """Mask one window. The draw of a position depends on (seed, sample, position) alone, so a change of segments or of
        t never re-deals the others' noise.

        Args:
            window: clean tokens, segments and their t.
            masking: override of `self.masking` (validation always uses "fixed_count").
            purpose: name of the noise: "train" or "validation".
        """
        draws = mask_uniforms(self.seed, window.sample, len(window.tokens), purpose)
        choose = self._fixed_count if (masking or self.masking) == "fixed_count" else self._bernoulli
        weights = np.zeros(len(window.tokens))
        for start, end, t, scale in window.segments():
            if start < end:
                weights[start:end] = scale * choose(draws[start:end], t)
        predicted = np.flatnonzero(weights)
        inputs = window.tokens.copy()
        inputs[predicted] = self.mask_id
        return Corrupted(inputs=inputs, predicted=predicted, weights=weights[predicted])

    def expected_predictions(self, lengths: np.ndarray, t: np.ndarray) -> float:
        """Mean number of masked tokens in segments of so many maskable tokens at these t; for counting FLOPs ahead of the draw."""
        if self.masking == "fixed_count":
            return float(np.minimum(1 + np.floor(t * lengths), lengths).sum())
        return float((((1 - self.eps) * t + self.eps) * lengths).sum())

    def _bernoulli(self, draws: np.ndarray, t: float) -> np.ndarray:
        p = (1 - self.eps) * t + self.eps
        return np.where(draws < p, 1 / p, 0.0)

    def _fixed_count(self, draws: np.ndarray, t: float) -> np.ndarray:
        length = len(draws)
        count = min(1 + int(t * length), length)
        weights = np.zeros(length)
        weights[np.argsort(draws, kind="stable")[:count]] = length / count
        return weights
