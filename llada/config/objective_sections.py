"""Settings of the objectives: `objective.name` says which one, each has settings of its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from llada.config.section import Section


class MaskedSection(Section):
    """LLaDA's masked diffusion (arXiv 2502.09992, Eq. 3)."""

    name: Literal["masked"] = "masked"
    """masked: LLaDA's masked diffusion (arXiv 2502.09992, Eq. 3), or with another schedule.
    discrete_steps: masked diffusion in a finite number of steps (D3PM). autoregressive: left to
    right. docs/objectives.md has the equations.
    """
    timesteps: Literal["stratified", "iid"] = "stratified"
    """How t is drawn for the noise groups of a step: stratified over the whole global step, or
    independently (iid).
    """
    masking: Literal["bernoulli", "fixed_count"] = "bernoulli"
    """bernoulli: masks each token with a probability that the schedule gives; llada's is p = (1 -
    eps) t + eps, weight 1/p. fixed_count: masks n = 1 + floor(t L) of the L tokens, weight L/n.
    """
    eps: float = Field(default=1e-3, ge=1e-6, le=0.1)
    """bernoulli: smallest time, at which schedule `llada` masks with this probability (the paper:
    1e-3). Schedule loglinear: also the probability that a token is clean at t = 1.
    """
    schedule: Literal["llada", "linear", "cosine", "loglinear", "geometric", "clipped"] = "llada"
    """bernoulli: how the masking probability rises with t. llada: as t. cosine: as in MD4.
    loglinear: as in SEDD and MDLM. linear, geometric: -log alpha rises linearly or exponentially
    from sigma_min to sigma_max. clipped: uniform between the two values of `clip` (BD3-LM); like
    all others from time eps on.
    """
    # With these limits alpha is above 0.9 at t = 0 and below 0.01 at t = 1. The loss of a schedule
    # that does not lead from clean to masked is no bound.
    sigma_min: float | None = Field(default=None, ge=1e-9, le=0.1)
    """Schedules linear and geometric: -log alpha at t = 0; null: 1e-4."""
    sigma_max: float | None = Field(default=None, ge=5, le=100)
    """Schedules linear and geometric: -log alpha at t = 1; null: 20."""
    clip: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """Schedule clipped: the smallest and the largest masking probability; null: [0.3, 0.8]."""
    subs: bool = False
    """true: the model cannot predict [MASK], whose logit counts as -inf (MDLM)."""

    @property
    def sigmas(self) -> tuple[float, float]:
        """-log alpha at t = 0 and 1, the defaults filled in."""
        smallest = 1e-4 if self.sigma_min is None else self.sigma_min
        largest = 20.0 if self.sigma_max is None else self.sigma_max
        return smallest, largest

    @property
    def clip_range(self) -> tuple[float, float]:
        """Smallest and largest masking probability, the default filled in."""
        low, high = self.clip or (0.3, 0.8)
        return low, high

    @model_validator(mode="after")
    def _check_schedule(self) -> MaskedSection:
        if self.masking == "fixed_count" and self.schedule != "llada":
            raise ValueError(
                f"schedule: {self.schedule} needs masking: bernoulli; fixed_count has no schedule"
            )
        if self.masking == "fixed_count" and self.eps != MaskedSection.model_fields["eps"].default:
            raise ValueError(
                f"eps: {self.eps:g} needs masking: bernoulli; fixed_count masks at every time"
            )
        self._refuse_unread("sigma_min", self.sigma_min, ("linear", "geometric"))
        self._refuse_unread("sigma_max", self.sigma_max, ("linear", "geometric"))
        self._refuse_unread("clip", self.clip, ("clipped",))
        low, high = self.clip_range
        if not 0 < low < high <= 1:
            raise ValueError(
                f"clip: [{low:g}, {high:g}] are not two rising probabilities above 0, at most 1"
            )
        return self

    def _refuse_unread(self, setting: str, value: object, schedules: tuple[str, ...]) -> None:
        """Refuse a setting that only some schedules read, where another one was chosen."""
        if value is not None and self.schedule not in schedules:
            raise ValueError(
                f"{setting}: has no effect with schedule {self.schedule}, only with"
                f" {' and '.join(schedules)}"
            )


class DiscreteStepsSection(Section):
    """Masked diffusion in a finite number of steps (D3PM with an absorbing state)."""

    name: Literal["discrete_steps"] = "discrete_steps"
    steps: int = Field(default=1000, ge=1, le=1_000_000)
    """discrete_steps: number of steps T between clean and masked."""
    timesteps: Literal["stratified", "iid"] = "stratified"
    """How t is drawn for the noise groups of a step, as for masked."""


class AutoregressiveSection(Section):
    """Left-to-right prediction with a causal mask."""

    name: Literal["autoregressive"] = "autoregressive"


def _name_of(section: object) -> str:
    """Return the name in a section that is not validated yet; masked is the default."""
    if isinstance(section, dict):
        name = section.get("name", "masked")
        return "null" if name is None else str(name)
    return str(getattr(section, "name", "masked"))


ObjectiveSection = Annotated[
    Annotated[MaskedSection, Tag("masked")]
    | Annotated[DiscreteStepsSection, Tag("discrete_steps")]
    | Annotated[AutoregressiveSection, Tag("autoregressive")],
    Discriminator(_name_of),
]
"""Settings of the objective that `name` chooses."""
