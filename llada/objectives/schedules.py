"""How the probability of being masked rises with t, and the weight that follows from it.

alpha(t) is the probability that a token is still clean at time t. The negative ELBO in continuous
time is the integral over t of -alpha'(t) times the mean loss of a token that is clean at t and
masked soon after (MDLM, arXiv 2406.07524). A draw masks with probability p = 1 - alpha(t),
so the loss of a masked token has the weight -alpha'(t) / p.

With u = 1 - alpha(t) as the variable of integration the schedule is gone: all schedules whose alpha
falls from 1 to 0 have the same expectation. They differ in variance, and in which rates a model
sees often.

Example, cosine at t = 1/2: alpha = 1 - cos(pi / 4) = 0.293, p = 0.707, -alpha' = pi / 2 x sin(pi /
4) = 1.111, weight 1.571.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llada.arrays import F64


@dataclass(frozen=True)
class Rates:
    """What a schedule says about some t.

    Attributes:
        probability: of being masked, 1 - alpha(t), float64 [n].
        weight: of the loss of a masked token, -alpha'(t) / (1 - alpha(t)), float64 [n].
    """

    probability: F64
    weight: F64


Schedule = Callable[[F64], Rates]
"""t in (0, 1], float64 [n] -> rates."""


def llada(t: F64) -> Rates:
    """alpha = 1 - t (LLaDA, arXiv 2502.09992, Eq. 3)."""
    return Rates(t, 1 / t)


def cosine(t: F64) -> Rates:
    """alpha = 1 - cos(pi / 2 (1 - t)) (MD4, arXiv 2406.04329).

    The code of MDLM and BD3-LM has another cosine, alpha = cos(pi / 2 t), which masks less.
    """
    angle = np.pi / 2 * (1 - t)
    probability = np.cos(angle)
    return Rates(probability, np.pi / 2 * np.sin(angle) / probability)


def total_noise(noise: F64, rate: F64) -> Rates:
    """Return the rates of alpha = exp(-noise), whose -alpha' is rate x alpha.

    Args:
        noise: -log alpha(t), float64 [n].
        rate: its derivative by t, float64 [n].
    """
    probability = -np.expm1(-noise)
    return Rates(probability, rate * np.exp(-noise) / probability)


@dataclass(frozen=True)
class Linear:
    """-log alpha rises linearly with t (MDLM, appendix).

    Attributes:
        sigma_min, sigma_max: -log alpha at t = 0 and 1.
    """

    sigma_min: float
    sigma_max: float

    def __call__(self, t: F64) -> Rates:
        """Return the rates at t."""
        slope = self.sigma_max - self.sigma_min
        return total_noise(self.sigma_min + slope * t, np.full_like(t, slope))


@dataclass(frozen=True)
class Geometric:
    """-log alpha rises exponentially with t (SEDD, arXiv 2310.16834; MDLM, appendix).

    Attributes:
        sigma_min, sigma_max: -log alpha at t = 0 and 1.
    """

    sigma_min: float
    sigma_max: float

    def __call__(self, t: F64) -> Rates:
        """Return the rates at t."""
        noise = self.sigma_min ** (1 - t) * self.sigma_max**t
        return total_noise(noise, noise * np.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True)
class Clipped:
    """The probability of being masked is uniform between two bounds (BD3-LM, arXiv 2503.09573).

    Rates near 0 and 1 teach little and add variance, so a model trains without them. The sum is
    then no bound: it leaves out what lies outside.

    Attributes:
        low, high: bounds of the probability.
    """

    low: float
    high: float

    def __call__(self, t: F64) -> Rates:
        """Return the rates at t."""
        probability = self.low + (self.high - self.low) * t
        return Rates(probability, (self.high - self.low) / probability)


@dataclass(frozen=True)
class LogLinear:
    """alpha = 1 - (1 - eps) t: -log alpha rises with the logarithm of t (SEDD; MDLM).

    Attributes:
        eps: alpha at t = 1.
    """

    eps: float

    def __call__(self, t: F64) -> Rates:
        """Return the rates at t."""
        return Rates((1 - self.eps) * t, 1 / t)
