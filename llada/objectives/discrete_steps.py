"""Masked diffusion in a finite number of steps (D3PM with an absorbing state, arXiv 2107.03006).

A token survives to step i of T with probability 1 - i / T. The negative ELBO is a sum over steps,

    sum over i = 1..T of (p_i - p_(i-1)) / p_i x E[loss of the tokens masked at step i],  p_i = i/T,

of which a draw takes one step, at random, T times. With more steps it falls to masked diffusion in
continuous time.

Example: T = 4, t = 0.6 is step i = 1 + floor(2.4) = 3: p = 0.75, weight 4 x (0.75 - 0.5) / 0.75 =
1.333.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llada.arrays import F64
from llada.objectives.masked import MaskedDiffusion
from llada.objectives.schedules import Rates


@dataclass(frozen=True)
class StepSchedule:
    """Masking rates of T equal steps.

    Attributes:
        steps: T.
    """

    steps: int

    def __call__(self, t: F64) -> Rates:
        """Return the rates of the step that each t in [0, 1) lies in."""
        step = np.minimum(1 + np.floor(t * self.steps), self.steps)
        probability = step / self.steps
        # T (p_i - p_(i-1)) / p_i, and the steps are equal: p_i - p_(i-1) = 1 / T.
        return Rates(probability, 1 / probability)


@dataclass(frozen=True)
class DiscreteSteps(MaskedDiffusion):
    """Masks every noise group at the rate of one of T steps; made by `discrete_steps`."""

    @property
    def summary(self) -> str:
        """Name, which has the number of steps, and timesteps."""
        return f"{self.schedule_name}, t {self.timesteps}"

    def bound(self) -> DiscreteSteps:
        """Return itself: its expectation is the negative ELBO of T steps."""
        return self


def discrete_steps(mask_id: int, steps: int, timesteps: str = "stratified") -> DiscreteSteps:
    """Return the objective of `steps` steps; t is drawn as `timesteps` says."""
    return DiscreteSteps(
        mask_id,
        masking="bernoulli",
        eps=0.0,  # the first step masks often enough
        timesteps=timesteps,
        schedule=StepSchedule(steps),
        schedule_name=f"{steps} discrete steps",
    )
