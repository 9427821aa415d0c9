"""Objectives by the name that they have in a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llada.config.objective_sections import (
    AutoregressiveSection,
    DiscreteStepsSection,
    MaskedSection,
    ObjectiveSection,
)
from llada.objectives import schedules
from llada.objectives.autoregressive import Autoregressive
from llada.objectives.discrete_steps import discrete_steps
from llada.objectives.masked import MaskedDiffusion
from llada.objectives.objective import Objective
from llada.objectives.schedules import Schedule
from llada.tokenizer import Tokenizer


class SpecialIds(NamedTuple):
    """Token ids that objectives write into a row.

    Attributes:
        mask: [MASK].
        start: what the first position of a text reads: BOS, or else EOS.
    """

    mask: int
    start: int


def start_id(tokenizer: Tokenizer) -> int:
    """Return the token id that begins a text: BOS, or else EOS."""
    if tokenizer.bos_id is None:
        return tokenizer.eos_id
    return tokenizer.bos_id


def make_objective(section: ObjectiveSection, ids: SpecialIds) -> Objective:
    """Return the objective of a config."""
    return OBJECTIVES[section.name](section, ids)


def _make_masked(section: MaskedSection, ids: SpecialIds) -> Objective:
    return MaskedDiffusion(
        ids.mask,
        section.masking,
        section.eps,
        section.timesteps,
        make_schedule(section),
        section.schedule,
        section.subs,
    )


def make_schedule(section: MaskedSection) -> Schedule:
    """Return the schedule of a masked objective."""
    match section.schedule:
        case "llada":
            return schedules.llada
        case "cosine":
            return schedules.cosine
        case "loglinear":
            return schedules.LogLinear(section.eps)
        case "linear":
            return schedules.Linear(*section.sigmas)
        case "geometric":
            return schedules.Geometric(*section.sigmas)
        case "clipped":
            return schedules.Clipped(*section.clip_range)


def _make_discrete_steps(section: DiscreteStepsSection, ids: SpecialIds) -> Objective:
    return discrete_steps(ids.mask, section.steps, section.timesteps)


def _make_autoregressive(section: AutoregressiveSection, ids: SpecialIds) -> Objective:
    return Autoregressive(ids.start)


OBJECTIVES: dict[str, Callable[[Any, SpecialIds], Objective]] = {
    "masked": _make_masked,
    "discrete_steps": _make_discrete_steps,
    "autoregressive": _make_autoregressive,
}
"""Name -> what makes the objective from its section and the special ids."""
