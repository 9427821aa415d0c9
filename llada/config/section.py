"""The base class of every group of settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings: unknown keys are refused, and a value of another type is not converted.

    The docstring under a field is its description; docs/configuration.md lists all of them.
    """

    model_config = ConfigDict(
        extra="forbid",  # an unknown key is a misspelled one
        strict=True,  # no "8" for 8, no 1 for true
        allow_inf_nan=False,  # YAML has .nan and .inf; no setting means anything with them
        frozen=True,  # what was recorded at the start of a run stays true
        use_attribute_docstrings=True,
    )
