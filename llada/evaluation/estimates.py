"""Means of validation losses, and how far they may be off.

A text (a window or a part of a document in it, or a reply) is read in sweeps: four draws at evenly
spaced t, from an offset that is keyed by the text. The mean is a pooled ratio

    R = sum of losses / sum of lengths

and has two errors:

* `se`, over other text. The items (windows, documents, conversations) are independent. With e_i =
  sum over the draws of item i of (loss - R x length), and h_i its share of the total length,

      SE = sqrt((k - 1) / k x sum of (e_i / (1 - h_i))^2) / total length

  the jackknife of a ratio (Cochran, Sampling Techniques, section 6.17). For items of equal length
  that is sqrt(k / (k - 1) x sum of e_i^2) / total length. What is left of the noise of t and masks
  is in e_i already. Intervals use Student's t. Items of unequal length have the degrees of freedom
  of the fewer items of equal length that would weigh as evenly (Kish), less one.
* `se_noise`, over other noise on the same text, see `noise_error`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from llada.arrays import F64, I64

SWEEP = 4
"""Draws of a sweep."""
LEVEL = 0.95
"""Probability with which an interval holds the truth."""
FEW = 9
"""Below this number of effective items a standard error is rough; the simulations start there."""
_CONTRAST = np.array([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Estimate:
    """A mean with its errors.

    Attributes:
        mean: mean over the draws.
        se: standard error over other text; None: of one item, which tells nothing of others.
        se_noise: standard error over other noise on the same text; None: of one sweep.
        degrees: degrees of freedom of `se`.
    """

    mean: float
    se: float | None
    se_noise: float | None
    degrees: float

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in another unit."""
        return Estimate(
            self.mean * factor,
            _scaled_error(self.se, factor),
            _scaled_error(self.se_noise, factor),
            self.degrees,
        )

    def half_width(self, level: float = LEVEL) -> float | None:
        """Return half the width of the interval that holds the truth with probability `level`."""
        if self.se is None:
            return None
        return self.se * t_quantile(level, self.degrees)

    def interval(self) -> list[float] | None:
        """Return both ends of the 95 % interval."""
        half = self.half_width()
        if half is None:
            return None
        return [self.mean - half, self.mean + half]


def _scaled_error(error: float | None, factor: float) -> float | None:
    if error is None:
        return None
    return error * abs(factor)


@dataclass(frozen=True)
class CorpusLosses:
    """The losses of one corpus in one validation.

    Attributes:
        loss: loss of every draw, summed over its text, nats; a row per sweep, t ascending, float64
            [sweeps, 4].
        length: tokens of the text of each sweep, int64 [sweeps].
        item: which item the text belongs to, 0..k-1, int64 [sweeps].
        text: a number that sweeps of the same text share, int64 [sweeps].
    """

    loss: F64
    length: I64
    item: I64
    text: I64

    def by_item(self) -> tuple[F64, F64]:
        """Return loss and length of each item, summed over its draws, float64 [k] each."""
        return sums(self.item, self.loss.sum(axis=1)), sums(self.item, SWEEP * self.length)

    def effective_items(self) -> float:
        """Return how many items of equal length would weigh as evenly (Kish).

        A single item that holds most of the text leaves about one.
        """
        return effective(self.by_item()[1])

    def estimate(self) -> Estimate:
        """Return the loss per token with its errors."""
        loss, length = self.by_item()
        mean, se = pooled(loss, length)
        return Estimate(mean, se, noise_error(self), max(1.0, effective(length) - 1))


def effective(length: F64) -> float:
    """Return how many items of equal length weigh as evenly as items of these lengths (Kish)."""
    return float(length.sum() ** 2 / (length**2).sum())


def sums(item: I64, values: npt.NDArray[np.number]) -> F64:
    """Return the sum of the values of each item, float64 [largest item + 1]."""
    return np.bincount(item, values).astype(np.float64)


def pooled(loss: F64, length: F64) -> tuple[float, float | None]:
    """Return the ratio of sums of independent items, and its standard error.

    Args:
        loss: summed loss of each item [k].
        length: summed length of each item [k].

    Returns:
        R and SE as in the module's docstring; SE is None for a single item.
    """
    total = length.sum()
    k = len(loss)
    ratio = loss.sum() / total
    if k == 1:
        return float(ratio), None
    # A long item draws the ratio to itself, which makes its own error small. Dividing by the share
    # of the others undoes that: R minus the ratio without item i is e_i / (1 - h_i) / total.
    errors = (loss - ratio * length) / (1 - length / total)
    return float(ratio), float(np.sqrt((k - 1) / k * (errors**2).sum()) / total)


def noise_error(sample: CorpusLosses) -> float | None:
    """Return the standard error of the pooled ratio over other noise on the same text.

    The spread of a text's four draws is mostly the change of the loss with t, which evenly spaced t
    average out, so it says little. Two terms remain. Both come from contrasts in which that change
    cancels:

    * Masks. x_1 - x_2 - x_3 + x_4 of a sweep (t ascending) has the variance of the sum of its four
      draws, whatever the variance of each, and a linear dependence on t cancels. The mean contrast
      per token, the curvature that all texts share, is subtracted.
    * Offset of t. The sum over evenly spaced t moves with the offset by the loss's rise from t = 0
      to t = 1, so its variance is rise^2 / 12, however many draws there are. The rise is the mean
      over all sweeps, extrapolated from the outer draws.

    Returns:
        None for a single sweep.
    """
    sweeps = len(sample.loss)
    if sweeps < 2:
        return None
    length = sample.length.astype(np.float64)

    contrast = sample.loss @ _CONTRAST
    curvature = contrast.sum() / length.sum()
    masks = sweeps / (sweeps - 1) * ((contrast - curvature * length) ** 2).sum()

    # Mean loss per token of the first to fourth draws. Consecutive draws are 1/4 apart and the
    # outer ones, on average over the offset, 1/8 from the ends: so the value at t = 0 is
    # low - (lower - low) / 2.
    low, lower, upper, high = sample.loss.sum(axis=0) / length.sum()
    rise = (3 * high - upper) / 2 - (3 * low - lower) / 2
    # All sweeps of a text share its offset, so each text counts once.
    _, first_sweep = np.unique(sample.text, return_index=True)
    offset = (rise * length[first_sweep]) ** 2 / 12
    return float(np.sqrt(masks + offset.sum()) / (SWEEP * length.sum()))


def weighted(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return the weighted mean of independent estimates.

    Its degrees of freedom follow Welch and Satterthwaite: se^4 / sum of (w_i se_i)^4 / degrees_i.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    mean = float(sum(w * e.mean for w, e in zip(shares, estimates, strict=True)))
    se = _root_of_squares(shares, [e.se for e in estimates])
    noise = _root_of_squares(shares, [e.se_noise for e in estimates])
    fourth = sum(
        (w * (e.se or 0.0)) ** 4 / e.degrees for w, e in zip(shares, estimates, strict=True)
    )
    if se and fourth:
        degrees = float(se**4 / fourth)
    else:  # no error, or unknown ones: there is no width to spread
        degrees = min(e.degrees for e in estimates)
    return Estimate(mean, se, noise, degrees)


def _root_of_squares(weights: F64, errors: Sequence[float | None]) -> float | None:
    """Return the error of a weighted sum; None if one of the errors is unknown."""
    # Independent errors add up by their squares.
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.hypot(*(w * e for w, e in zip(weights, known, strict=True)))


def format_estimate(mean: float, se: float | None, digits: int = 4) -> str:
    """Format a mean and its standard error, which is unknown for a single item."""
    error = "unknown" if se is None else f"{se:.{digits}f}"
    return f"{mean:.{digits}f} ± {error}"


def with_error(values: Mapping[str, float | None], key: str, digits: int = 4) -> str:
    """Format a figure of a validation line and its standard error."""
    mean = values[key]
    assert mean is not None
    return format_estimate(mean, values[f"{key}_se"], digits)


@cache
def _gauss_legendre() -> tuple[F64, F64]:
    """Return the nodes and weights of the quadrature of 64 points on -1..1, float64 [64] each."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    return nodes, weights


def t_quantile(level: float, degrees: float) -> float:
    """Return x with P(-x < T < x) = `level`, for Student's T of `degrees` degrees of freedom.

    `degrees` is at least 1 and need not be whole.
    """
    nodes, weights = _gauss_legendre()
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def probability(x: float) -> float:
        """P(|T| < x), integrated over the angle arctan(x / sqrt(degrees)).

        In the angle the density is a power of the cosine, which Gauss-Legendre integrates well.
        """
        angle = math.atan(x / math.sqrt(degrees))
        return scale * angle * float(weights @ np.cos(angle * nodes) ** (degrees - 1))

    # Bracket the quantile by doubling, then halve the bracket to the last digit.
    low = 0.0
    high = 1.0
    while probability(high) < level:
        low = high
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        if probability(middle) < level:
            low = middle
        else:
            high = middle
    return high
