"""Objectives by the name that they have in a config."""

from __future__ import annotations

from collections.abc import Callable

from llada.config.sections import ObjectiveSection
from llada.objectives.masked import MaskedDiffusion
from llada.objectives.objective import Objective


def make_objective(section: ObjectiveSection, mask_id: int) -> Objective:
    """Return the objective of a config.

    Args:
        section: of the config.
        mask_id: token id of [MASK].
    """
    return _OBJECTIVES[section.name](section, mask_id)


def _make_masked(section: ObjectiveSection, mask_id: int) -> Objective:
    return MaskedDiffusion(mask_id, section.masking, section.eps)


_OBJECTIVES: dict[str, Callable[[ObjectiveSection, int], Objective]] = {"masked": _make_masked}
