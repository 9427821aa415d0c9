"""From a YAML file to a RunConfig, and back.

A config is a YAML file plus dotted overrides (``train.steps=100``). Unknown keys are refused with
the nearest right name, and impossible combinations before anything is loaded.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from llada.config.overrides import RawConfig, apply_override, override_learning_rate
from llada.config.run import RunConfig, Task
from llada.config.strict_yaml import refuse_ambiguous
from llada.errors import UserError, did_you_mean, one_line

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PROVENANCE = "provenance"
"""Section that a run adds to its config.yaml: revision, versions, lineage. Not a setting."""


# -- reading ---------------------------------------------------------------------------------------


def read_config(
    path: str | Path,
    overrides: list[str] | None = None,
    task: Task | None = None,
    rewind: int | None = None,
) -> RawConfig:
    """Read a YAML config and apply overrides, without validating it.

    Args:
        path: YAML file.
        overrides: ``key.sub=value`` strings; values are YAML, list items are named by index
            (``data.mixture.0.path=...``).
        task: refuse a config for another task; None: any task.
        rewind: step from which an override ``lr=RATE`` applies; None: ``lr`` is no override.

    Raises:
        UserError: no such file, not YAML, an override that names no setting, another task.
    """
    raw = read_yaml(Path(path))
    raw.pop(PROVENANCE, None)  # so that a run's own config.yaml is a config too
    for override in overrides or []:
        if rewind is not None and override.startswith("lr="):
            override_learning_rate(raw, rewind, override)
        else:
            apply_override(raw, override)
    if task is not None:
        _check_task(raw, task, path)
    return raw


def _check_task(raw: RawConfig, task: Task, path: str | Path) -> None:
    """Refuse a config for another task. A task that does not exist is left to the validation."""
    stated = raw.get("task", "pretrain")
    if stated != task and stated in get_args(Task):
        raise UserError(
            f"task: {path} says '{stated}', `llada {task}` runs task '{task}' only; use `llada"
            f" {stated}`"
        )


def read_yaml(path: Path, setting: str = "config") -> RawConfig:
    """Read the mapping in a YAML file.

    Args:
        path: the file.
        setting: what the user calls the file, for messages.

    Raises:
        UserError: no such file, not YAML, ambiguous YAML, or not a mapping.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise UserError(f"{setting}: no file '{path}'{_similar_file(path)}")
    try:
        refuse_ambiguous(path.read_text(encoding="utf-8"), f"{setting}: {path}")
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"{setting}: {path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{setting}: {path} must contain a mapping of settings, not a {type(raw).__name__}"
        )
    return raw  # type: ignore[return-value]


def _similar_file(path: Path) -> str:
    """A hint at a file in the same folder with a similar name, or an empty string."""
    if not path.parent.is_dir():
        return ""
    # Stems are compared: the common ending ".yaml" would make all names similar.
    files = {file.stem: file for file in path.parent.glob("*.yaml")}
    near = difflib.get_close_matches(path.stem, files, n=1)
    if not near:
        return ""
    return f" (did you mean '{files[near[0]]}'?)"


# -- validating ------------------------------------------------------------------------------------


def build_config(raw: RawConfig) -> RunConfig:
    """Validate a parsed config.

    Raises:
        UserError: one line about the first mistake.
    """
    data = raw.get("data")
    if raw.get("task") == "sft" and isinstance(data, dict):
        # The section's default is that of pretraining; conversations are never cut.
        raw = {**raw, "data": {"random_length_probability": 0.0, **data}}
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(first_mistake(error, RunConfig)) from None


def first_mistake(error: ValidationError, root: type[BaseModel]) -> str:
    """The most helpful error of a validation as `setting: value, what is allowed (nearest name)`.

    Args:
        error: what pydantic raised.
        root: the settings that were validated; the nearest names come from it.
    """
    problems = error.errors(include_url=False)
    # Unknown names first: a misspelled required setting is also missing, and the misspelling
    # explains why. The sort is stable, so the rest keeps the order of the fields.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    location = _locate(first["loc"], root)
    setting = ".".join(location.names)

    if first["type"] == "extra_forbidden":
        return _unknown_setting(setting, location)
    if first["type"] == "union_tag_invalid":
        return _unknown_variant(setting, first)
    if first["type"] == "missing":
        return f"{setting}: missing, this setting has no default"
    if first["type"] == "value_error":
        return _rule_broken(setting, first["msg"].removeprefix("Value error, "))
    return _wrong_value(setting, location, first)


class _Location(NamedTuple):
    """Where in a config a mistake is.

    Attributes:
        names: of the sections and the setting, as in YAML; an item of a list is named by its index.
        section: the innermost section that exists.
        variants: if that section is one of several variants, all of them by name.
    """

    names: list[str]
    section: type[BaseModel]
    variants: dict[str, type[BaseModel]]


def _locate(loc: tuple[int | str, ...], root: type[BaseModel]) -> _Location:
    """Follow a location that pydantic reports through the sections below `root`.

    Below a section that is one of several variants, pydantic inserts the variant's name:
    ("objective", "masked", "eps") is objective.eps.
    """
    names: list[str] = []
    section = root
    variants: dict[str, type[BaseModel]] = {}
    for part in loc:
        if part in variants:
            section = variants[str(part)]
            continue
        names.append(str(part))
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        if isinstance(part, str) and part in fields:
            inside = _sections_in(fields[part].annotation)
            if len(inside) == 1:
                section = inside[0]
            variants = {}
            if len(inside) > 1:
                variants = {variant.model_fields["name"].default: variant for variant in inside}
    return _Location(names, section, variants)


def _sections_in(annotation: object) -> list[type[BaseModel]]:
    """The sections that an annotation names: `Section`, `list[Section]`, `A | B`, annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def _unknown_variant(setting: str, problem: ErrorDetails) -> str:
    """Message for a name that none of a section's variants has."""
    given = problem["ctx"]["tag"]
    allowed = [name.strip("' ") for name in problem["ctx"]["expected_tags"].split(",")]
    return (
        f"{setting}.name: {given!r} is not one of {', '.join(allowed)}"
        f"{did_you_mean(given, allowed)}"
    )


def _unknown_setting(setting: str, location: _Location) -> str:
    """Message for a key that is not a setting: `train.stps`, with `train.steps` as the hint."""
    section = setting.removesuffix(location.names[-1])
    owners = [
        name
        for name, variant in location.variants.items()
        if location.names[-1] in variant.model_fields
    ]
    if owners:
        chosen = location.section.model_fields["name"].default
        parent = section.removesuffix(".")
        return (
            f"{setting}: a setting of {' and '.join(owners)}, and {section}name is {chosen}; leave"
            f" it out ('{parent}={{name: {chosen}}}' replaces the whole section) or choose another"
            f" {section}name"
        )
    names = [
        section + (field.alias or name) for name, field in location.section.model_fields.items()
    ]
    return (
        f"{setting}: unknown setting{did_you_mean(setting, names)}; allowed here:"
        f" {', '.join(names)}"
    )


def _rule_broken(setting: str, message: str) -> str:
    """Message of one of our own rules, with the full name of its setting in front.

    A rule over several settings names the one to change at the start of its message
    ("hidden_size: 63 is not ..." in section `model`), so that the names join with a dot. A rule
    about a single setting does not.
    """
    if not setting:
        return message  # a rule across sections: its message starts with the full name
    names_a_setting = re.match(r"[a-z_]+(\[\d+\])?: ", message)
    if names_a_setting:
        return f"{setting}.{message}"
    return f"{setting}: {message}"


def _wrong_value(setting: str, location: _Location, problem: ErrorDetails) -> str:
    """Message for a value of the wrong type or out of range."""
    message = problem["msg"]
    hint = ""
    if problem["type"] in ("model_type", "model_attributes_type"):
        names = list(location.section.model_fields)
        if "name" in names and isinstance(problem["input"], str):
            hint = f" (did you mean '{setting}.name: {problem['input']}'?)"
        return f"{setting}: {problem['input']!r} is not a section with settings{hint}"
    if problem["type"] == "literal_error":
        # Pydantic lists the choices as text: "'bernoulli', 'x' or 'fixed_count'".
        choices = problem["ctx"]["expected"].replace(" or ", ", ").split(", ")
        hint = did_you_mean(str(problem["input"] or ""), [choice.strip("' ") for choice in choices])
    # YAML reads 1e9 as a number with a fraction.
    given = problem["input"]
    if problem["type"] == "int_type" and isinstance(given, float) and given.is_integer():
        hint = f" (write {given:.0f})"
    sentence = f"{message[0].lower()}{message[1:]}"
    return f"{setting}: {problem['input']!r} is not allowed: {sentence}{hint}"


# -- writing ---------------------------------------------------------------------------------------


def dump_config(config: RunConfig) -> RawConfig:
    """The resolved config as a nested dict with the names of the YAML file."""
    return config.model_dump(by_alias=True)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML; loading it gives an equal config."""
    import yaml

    return yaml.safe_dump(dump_config(config), sort_keys=False, default_flow_style=False)
