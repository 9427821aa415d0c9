"""From a YAML file to a RunConfig, and back.

A config is a YAML file plus dotted overrides (``train.steps=100``). Unknown keys are refused with
the nearest right name, impossible combinations before anything is loaded. The resolved config is
saved with each run.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from llada.config.overrides import apply_override, change_rate
from llada.config.run import RunConfig, Task
from llada.config.strict_yaml import refuse_ambiguous
from llada.errors import UserError, did_you_mean

PROVENANCE = "provenance"
"""Section that a run adds to its config.yaml: revision, versions, lineage. Not a setting."""


def read_config(
    path: str | Path,
    overrides: list[str] | None = None,
    task: Task | None = None,
    rewind: int | None = None,
) -> dict[str, Any]:
    """Read a YAML config and apply dotted overrides. Nothing is validated yet.

    Args:
        path: YAML file.
        overrides: ``key.sub=value`` strings; values are YAML; list items by index
            (``data.mixture.0.path=...``).
        task: refuse a config for another task (None: any).
        rewind: step from which an override ``lr=RATE`` holds; None: there is no such override.

    Raises:
        UserError: no such file, not YAML, an override that names no setting, another task.
    """
    raw = read_yaml(Path(path))
    raw.pop(PROVENANCE, None)  # a run's own config.yaml can be used as a config
    for override in overrides or []:
        if rewind is not None and override.startswith("lr="):
            change_rate(raw, rewind, override)
        else:
            apply_override(raw, override)
    if (
        task is not None
        and raw.get("task", "pretrain") != task
        and raw.get("task", "pretrain") in get_args(Task)
    ):
        found = raw.get("task", "pretrain")
        raise UserError(
            f"task: {path} says '{found}', `llada {task}` runs task '{task}' only; use `llada"
            f" {found}`"
        )
    return raw


def build_config(raw: dict[str, Any]) -> RunConfig:
    """Validate a plain nested dict. Raises UserError with one line for the first thing that is
    wrong.
    """
    data = raw.get("data")
    if raw.get("task") == "sft" and isinstance(data, dict):
        raw = {
            **raw,
            "data": {"random_length_probability": 0.0, **data},
        }  # the default is one of pretraining
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(one_line(error, RunConfig)) from None


def dump_config(config: RunConfig) -> dict[str, Any]:
    """The resolved config as a plain nested dict with the names of the YAML file."""
    return config.model_dump(by_alias=True)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML; `load_config` of it gives the same config."""
    import yaml

    return yaml.safe_dump(dump_config(config), sort_keys=False, default_flow_style=False)


def read_yaml(path: Path, setting: str = "config") -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError, with what the user calls the file, when there
    is none.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise UserError(f"{setting}: no file '{path}'{_near_file(path)}")
    try:
        refuse_ambiguous(path.read_text(encoding="utf-8"), f"{setting}: {path}")
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(
            f"{setting}: {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{setting}: {path} must hold a mapping of settings, not a {type(raw).__name__}"
        )
    return raw  # type: ignore[return-value]


def _near_file(path: Path) -> str:
    """A file beside it with a similar name; the ending is not what makes names similar."""
    beside = (
        {other.stem: other for other in path.parent.glob("*.yaml")} if path.parent.is_dir() else {}
    )
    near = difflib.get_close_matches(path.stem, beside, n=1)
    return f" (did you mean '{beside[near[0]]}'?)" if near else ""


def one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem as `setting: value, what is allowed (nearest name)`; unknown names first,
    since they explain the missing ones.
    """
    problems = error.errors(include_url=False)
    problems.sort(key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        prefix = where.removesuffix(str(first["loc"][-1]))
        names = [prefix + name for name in _setting_names(first["loc"][:-1], root)]
        return (
            f"{where}: unknown setting{did_you_mean(where, names)}; allowed here:"
            f" {', '.join(names)}"
        )
    if first["type"] == "missing":
        return f"{where}: missing, this setting has no default"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        # Of a group of settings the message names the one that is meant, of a single setting it
        # does not.
        between = "." if re.match(r"[a-z_]+(\[\d+\])?: ", message) else ": "
        return f"{where}{between}{message}" if where else message
    near = ""
    if first["type"] == "literal_error":
        near = did_you_mean(
            str(first["input"]),
            [
                part.strip("' ")
                for part in first["ctx"]["expected"].replace(" or ", ", ").split(", ")
            ],
        )
    return f"{where}: {first['input']!r} is not allowed: {message[0].lower()}{message[1:]}{near}"


def _setting_names(loc: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The names allowed in the section at `loc` of the settings in `root`."""
    section = root
    for part in loc:
        if isinstance(part, int):
            continue
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        annotation = fields[part].annotation
        section = next(iter(get_args(annotation)), annotation)  # type: ignore[assignment]
    return [field.alias or name for name, field in section.model_fields.items()]
