"""LLaDA's masked diffusion objective (arXiv 2502.09992, Eq. 3 and appendix A).

A noise group has L tokens (an attention segment in pretraining, the response in fine-tuning) and a
time t. There are two ways to mask it:

* bernoulli: each token is masked independently with the probability p that the schedule
  (`llada.objectives.schedules`) has at (1 - eps) t + eps. LLaDA's is p = (1 - eps) t + eps, and the
  loss of a masked token has weight 1 / p.
* fixed_count: exactly n = 1 + floor(t L) tokens are masked, uniformly without replacement, with
  weight L / n. With t uniform, n is uniform on 1..L, and the expected weighted sum is exactly the
  negative ELBO of the group in nats.

Example: L = 4, t = 0.6. bernoulli masks each token with p = 0.6004 and weight 1.666; fixed_count
masks n = 1 + floor(2.4) = 3 of the four tokens with weight 4 / 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llada.arrays import F64, I64
from llada.noise import timesteps
from llada.objectives import schedules
from llada.objectives.corrupted import TOKENS, Corrupted, Terms
from llada.objectives.layout import Layout
from llada.objectives.losses import CROSS_ENTROPY, CrossEntropyWithout, Loss
from llada.objectives.objective import Work
from llada.objectives.row import Key, NoiseGroups, Row
from llada.objectives.schedules import Rates, Schedule

Masked = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MaskedDiffusion:
    """Masks the tokens of every noise group at the group's own rate.

    Attributes:
        mask_id: token id of [MASK].
        masking: "bernoulli" or "fixed_count".
        eps: smallest time that bernoulli masks at.
        timesteps: how t is drawn, see `llada.noise.timesteps`.
        schedule: masking probability and weight at a time, of bernoulli.
        schedule_name: for people.
        subs: whether the model may not predict [MASK], which no clean text has (MDLM's SUBS).
    """

    mask_id: int
    masking: str = "bernoulli"
    eps: float = 1e-3
    timesteps: str = "stratified"
    schedule: Schedule = schedules.llada
    schedule_name: str = "llada"
    subs: bool = False

    @property
    def summary(self) -> str:
        """Name, masking, what differs from LLaDA's, and timesteps."""
        words = ["masked", self.masking]
        if self.schedule_name != "llada":
            words.append(f"{self.schedule_name} schedule")
        if self.subs:
            words.append("subs")
        return ", ".join([*words, f"t {self.timesteps}"])

    def draw_t(self, seed: int, step: int, shares: F64) -> F64:
        """Draw t; the arguments are those of `Objective`."""
        return timesteps(seed, step, shares, self.timesteps)

    @property
    def losses(self) -> Mapping[str, Loss]:
        """Cross entropy; with `subs`, of a softmax without [MASK]."""
        if self.subs:
            return {TOKENS: CrossEntropyWithout(self.mask_id)}
        return CROSS_ENTROPY

    @property
    def is_exact(self) -> bool:
        """Return false: the sum is a bound only on average."""
        return False

    @property
    def pads_responses(self) -> bool:
        """Return true: the end of a text is predicted like its words."""
        return True

    def input_length(self, length: int) -> int:
        """Return `length`: the model reads the row itself."""
        return length

    def groups(self, spans: I64) -> tuple[I64, I64]:
        """Return one group for each attention segment."""
        return spans, np.arange(len(spans), dtype=np.int64)

    def corrupt(self, row: Row, key: Key) -> Corrupted:
        """Mask one row: each masked position is a term of the loss.

        Another segmentation or another t leaves the noise of all positions as it is.
        """
        draws = row.position_uniforms(key)
        groups = row.groups
        if self.masking == "fixed_count":
            chosen, weights = self._fixed_count(draws, groups.spans, groups.t)
        else:
            chosen, weights = self._bernoulli(draws, groups.spans, groups.t)
        position_weights = _spread(groups.scales * weights, groups.spans, len(draws))

        # A group of scale 0 adds nothing to the loss: it is not masked at all.
        if (groups.scales == 0).any():
            chosen = chosen & (position_weights != 0)
        masked = np.flatnonzero(chosen)
        inputs = row.tokens.copy()
        inputs[masked] = self.mask_id
        length = len(row.tokens)
        terms = Terms(
            positions=masked,
            targets=row.tokens[masked],
            weights=position_weights[masked],
            groups=groups.ids[np.searchsorted(groups.spans[:, 1], masked, side="right")],
        )
        return Corrupted(
            inputs=inputs,
            # They do not restart at documents, which changes nothing: rotary positions count
            # relative to each other only.
            positions=np.arange(length, dtype=np.int64),
            layout=Layout((tuple(row.bounds.tolist()),), length),
            terms={TOKENS: terms},
        )

    def bound(self) -> MaskedDiffusion:
        """Return fixed-count masking, whose expectation is the exact negative ELBO.

        It has no schedule, and validation draws t itself: all that is left of this one is `subs`.
        """
        return MaskedDiffusion(self.mask_id, masking="fixed_count", subs=self.subs)

    def work(self, segment_lengths: I64, groups: NoiseGroups) -> Work:
        """Return what a step computes; the arguments are those of `Objective`."""
        sizes = groups.sizes
        if self.masking == "fixed_count":
            masked = np.minimum(1 + np.floor(groups.t * sizes), sizes).sum()
        else:
            masked = (self._rates(groups.t).probability * sizes).sum()
        pairs = int((segment_lengths * segment_lengths).sum())
        return Work(
            inputs=int(segment_lengths.sum()),
            terms={TOKENS: float(masked)},
            attended_pairs=pairs,
        )

    # Both rules take draws [L], and spans [n, 2] and t [n] of the groups. They return which
    # positions are masked, bool [L], and the weight of a masked position in each group, float64
    # [n].

    def _bernoulli(self, draws: F64, spans: I64, t: F64) -> tuple[Masked, F64]:
        rates = self._rates(t)
        return draws < _spread(rates.probability, spans, len(draws)), rates.weight

    def _rates(self, t: F64) -> Rates:
        return self.schedule((1 - self.eps) * t + self.eps)

    def _fixed_count(self, draws: F64, spans: I64, t: F64) -> tuple[Masked, F64]:
        lengths = spans[:, 1] - spans[:, 0]
        # t L may round up to L for t just below 1, which would give L + 1.
        counts = np.minimum(1 + (t * lengths).astype(np.int64), lengths)
        chosen = _smallest_of_each(draws, spans, counts)
        # An empty span has count 0; its weight is never used.
        return chosen, lengths / np.maximum(counts, 1)


def _spread(values: F64, spans: I64, length: int) -> F64:
    """Give every position the value of its group, and 0 outside all spans; float64 [length].

    Example: values (5, 7), spans (1, 3) and (3, 4), length 6. The edges are 0, 1, 3, 3, 4, 6, the
    values between them 0, 5, 0, 7, 0, and the result is 0, 5, 5, 7, 0, 0.

    Args:
        values: one per group [n].
        spans: [start, stop) of each group, ascending and disjoint, int64 [n, 2].
        length: number of positions.
    """
    edges = np.concatenate([[0], spans.ravel(), [length]])
    # Spans and the gaps around them alternate; most gaps are empty.
    between_edges = np.zeros(len(edges) - 1)
    between_edges[1::2] = values
    return np.repeat(between_edges, np.diff(edges))


def _smallest_of_each(draws: F64, spans: I64, counts: I64) -> Masked:
    """Which draws are among the smallest of their group, bool [L]; of equal ones the earlier.

    There may be a group for every few tokens, so all are sorted at once: by group, and within a
    group by draw.

    Args:
        draws: of all positions [L].
        spans: of the groups, int64 [n, 2].
        counts: how many of each group, int64 [n].
    """
    sizes = spans[:, 1] - spans[:, 0]
    group = np.repeat(np.arange(len(spans)), sizes)
    place_in_group = np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group]
    positions = spans[group, 0] + place_in_group

    # Sorted, the groups keep their places, so the place in a group is the rank of a draw.
    order = np.lexsort((draws[positions], group))
    chosen = np.zeros(len(draws), dtype=bool)
    chosen[positions[order[place_in_group < counts[group]]]] = True
    return chosen
