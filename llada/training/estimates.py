"""Means of validation losses, and how far they may be off.

A text (a window or a part of a document in it, or a reply) is read in sweeps: four draws at evenly spaced t, from an offset that is
keyed by the text. The mean is a pooled ratio R = sum of losses / sum of lengths. It has two errors:

* `se`: of other text. The items (windows, documents, conversations) are independent, so with e_i = sum over the draws of item i of
  (loss - R x length) and h_i its share of the total length, SE = sqrt((k - 1) / k x sum (e_i / (1 - h_i))^2) / total length, the
  jackknife of a ratio (Cochran, Sampling Techniques, section 6.17). For items of equal length that is sqrt(k / (k - 1) x sum e_i^2).
  What is left of the noise of t and masks is in e_i already. Intervals use Student's t; k items of unequal length have the degrees of
  freedom of the fewer items of equal length that would weigh as evenly (Kish), less one.
* `se_noise`: of the same text under other noise, see `noise_error`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

SWEEP = 4
"""Draws of a sweep."""
LEVEL = 0.95
"""Of the intervals."""
FEW = 9
"""Effective items below which a standard error is rough; the simulations start there."""
_CONTRAST = np.array([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Estimate:
    """A mean with its errors.

    Attributes:
        mean: of the draws.
        se: standard error over other text; None: of one item, which tells nothing of others.
        se_noise: standard error over other noise on the same text; None: of one sweep.
        degrees: of freedom of `se`.
    """

    mean: float
    se: float | None
    se_noise: float | None
    degrees: float

    def scaled(self, factor: float) -> Estimate:
        """In another unit."""
        se, noise = (None if error is None else error * abs(factor) for error in (self.se, self.se_noise))
        return Estimate(self.mean * factor, se, noise, self.degrees)

    def half_width(self, level: float = LEVEL) -> float | None:
        """Of the interval around the mean that holds the truth with probability `level`."""
        return None if self.se is None else self.se * t_quantile(level, self.degrees)

    def interval(self) -> list[float] | None:
        """Both ends of the 95 % interval."""
        half = self.half_width()
        return None if half is None else [self.mean - half, self.mean + half]


@dataclass(frozen=True)
class Sample:
    """The losses of one corpus in one validation.

    Attributes:
        loss: of every draw, summed over its text, nats; a row a sweep, t ascending, float64 [sweeps, 4].
        length: tokens of the text of each sweep, int64 [sweeps].
        item: whose text it is, 0..k-1, int64 [sweeps].
        text: a number that sweeps of the same text share, int64 [sweeps].
    """

    loss: F64
    length: I64
    item: I64
    text: I64

    def by_item(self) -> tuple[F64, F64]:
        """Sums of loss and length over all draws of each item, float64 [k] each."""
        return sums(self.item, self.loss.sum(axis=1)), sums(self.item, SWEEP * self.length)

    def effective_items(self) -> float:
        """How many items of equal length would weigh as evenly (Kish): a single one that holds most of the text leaves about one."""
        return effective(self.by_item()[1])

    def estimate(self) -> Estimate:
        """Loss per token with its errors."""
        loss, length = self.by_item()
        mean, se = pooled(loss, length)
        return Estimate(mean, se, noise_error(self), max(1.0, effective(length) - 1))


def effective(length: F64) -> float:
    """How many items of equal length weigh as evenly as items of these lengths (Kish)."""
    return float(length.sum() ** 2 / (length**2).sum())


def sums(item: I64, values: npt.NDArray[np.number]) -> F64:
    """Sum of the values of each item, float64 [largest item + 1]."""
    return np.bincount(item, values).astype(np.float64)


def pooled(loss: F64, length: F64) -> tuple[float, float | None]:
    """Ratio of the sums of independent items and its standard error, None for a single one.

    An item with much of the length draws the ratio to itself and makes its own error small: dividing by what the others have of the
    length undoes that.
    """
    total, k = length.sum(), len(loss)
    ratio = loss.sum() / total
    if k == 1:
        return float(ratio), None
    errors = (loss - ratio * length) / (1 - length / total)
    return float(ratio), float(np.sqrt((k - 1) / k * (errors**2).sum()) / total)


def noise_error(sample: Sample) -> float | None:
    """Standard error of the pooled ratio if the same text were read with other masks and other offsets of t.

    The spread of a text's four draws is mostly the change of the loss with t, which evenly spaced t average out, so it says little.
    Two terms remain, and both are read off contrasts in which that change cancels:

    * Masks. x_1 - x_2 - x_3 + x_4 of a sweep (t ascending) has the variance of the sum of its four draws, whatever the variance of each,
      and a linear dependence on t cancels. The mean contrast per token, the curvature that all texts share, is subtracted.
    * Offset. The sum over evenly spaced t moves with the offset by the loss's rise from t = 0 to t = 1, so its variance is rise^2 / 12,
      however many draws there are. The rise is the mean over all sweeps, extrapolated from the outer draws.
    """
    sweeps = len(sample.loss)
    if sweeps < 2:
        return None
    length = sample.length.astype(np.float64)
    contrast = sample.loss @ _CONTRAST
    masks = sweeps / (sweeps - 1) * ((contrast - contrast.sum() / length.sum() * length) ** 2).sum()
    low, lower, upper, high = sample.loss.sum(axis=0) / length.sum()
    rise = (3 * high - upper) / 2 - (3 * low - lower) / 2
    _, first = np.unique(sample.text, return_index=True)
    offset = (rise * length[first]) ** 2 / 12
    return float(np.sqrt(masks + offset.sum()) / (SWEEP * length.sum()))


def weighted(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Weighted mean of independent estimates; degrees of freedom by Welch and Satterthwaite."""
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    mean = float(sum(w * e.mean for w, e in zip(share, estimates, strict=True)))
    se = _root_of_squares(share, [e.se for e in estimates])
    noise = _root_of_squares(share, [e.se_noise for e in estimates])
    fourth = sum((w * (e.se or 0.0)) ** 4 / e.degrees for w, e in zip(share, estimates, strict=True))
    degrees = float(se**4 / fourth) if se and fourth else min(e.degrees for e in estimates)
    return Estimate(mean, se, noise, degrees)


def _root_of_squares(weights: F64, errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.hypot(*(w * e for w, e in zip(weights, known, strict=True))) if len(known) == len(errors) else None


def with_error(values: dict[str, Any], key: str, digits: int = 4) -> str:
    """A figure of a validation line and its standard error, which a single item does not have."""
    error = values[f"{key}_se"]
    return f"{values[key]:.{digits}f} ± " + ("unknown" if error is None else f"{error:.{digits}f}")


def t_quantile(level: float, degrees: float) -> float:
    """x with P(-x < T < x) = `level` for Student's T of `degrees` degrees of freedom (at least 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def probability(x: float) -> float:
        """P(|T| < x), integrated over the angle arctan(x / sqrt(degrees)), where the density is a power of the cosine."""
        angle = math.atan(x / math.sqrt(degrees))
        return scale * angle * float(weights @ np.cos(angle * nodes) ** (degrees - 1))

    low, high = 0.0, 1.0
    while probability(high) < level:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return high
