"""Settings of the objectives: `objective.name` says which one, each has settings of its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from llada.config.section import Section


class MaskedSection(Section):
    """LLaDA's masked diffusion (arXiv 2502.09992, Eq. 3)."""

    name: Literal["masked"] = "masked"
    """masked: LLaDA's masked diffusion (arXiv 2502.09992, Eq. 3). autoregressive: left to right."""
    timesteps: Literal["stratified", "iid"] = "stratified"
    """How t is drawn for the noise groups of a step: stratified over the whole global step, or
    independently (iid).
    """
    masking: Literal["bernoulli", "fixed_count"] = "bernoulli"
    """bernoulli: masks each token with probability p = (1 - eps) t + eps, weight 1/p. fixed_count:
    masks n = 1 + floor(t L) of the L tokens, weight L/n.
    """
    eps: float = Field(default=1e-3, gt=0, lt=1)
    """Smallest masking probability of bernoulli (the paper: 1e-3)."""


class AutoregressiveSection(Section):
    """Left-to-right prediction with a causal mask."""

    name: Literal["autoregressive"] = "autoregressive"


def _name_of(section: object) -> str:
    """Return the name in a section that is not validated yet; masked is the default."""
    if isinstance(section, dict):
        return str(section.get("name", "masked"))
    return str(getattr(section, "name", "masked"))


ObjectiveSection = Annotated[
    Annotated[MaskedSection, Tag("masked")]
    | Annotated[AutoregressiveSection, Tag("autoregressive")],
    Discriminator(_name_of),
]
"""Settings of the objective that `name` chooses."""
