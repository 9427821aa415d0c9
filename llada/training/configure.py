"""Loading a config as the commands do: its model section is completed from the weights that the run
starts from.

A converted model keeps its meaning only with its own rotary base and norm epsilon. So settings that
a config leaves out come from the folder that `run.init_from` names, not from the defaults, and the
whole section may be left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llada.config import RunConfig, Task, build_config, read_config, read_yaml
from llada.config.sections import ModelSection
from llada.errors import UserError

FROM = "from"
"""Key of the model section that names a folder to take it from; it is replaced by what the folder
says.
"""
_INITIAL = ("embedding_init_std",)
"""Settings of initial weights, which say nothing about a model that is there."""


def load_config(
    path: str | Path,
    overrides: list[str] | None = None,
    task: Task | None = None,
    rewind: int | None = None,
) -> RunConfig:
    """Read a YAML config, apply overrides, take the model from the folder it names, validate.

    The arguments are those of `llada.config.read_config`.

    Raises:
        UserError: anything wrong, in one line that names the setting.
    """
    return build_config(complete_model(read_config(path, overrides, task, rewind)))


def model_of(path: str | Path, setting: str) -> dict[str, Any]:
    """The model section of a Hugging Face folder, a checkpoint, or a run's latest checkpoint.

    Raises UserError, with what the user calls `path`, when it is none.
    """
    from llada.checkpoint.format import read_state, resolve_checkpoint, trained_config
    from llada.hf import folder as hf

    if hf.is_folder(path):
        model = hf.read_model(path, setting).model
    else:
        try:
            model = trained_config(read_state(resolve_checkpoint(path))).model
        except UserError as error:
            raise UserError(f"{setting}: {str(error).removeprefix('checkpoint: ')}") from None
    return model.model_dump(exclude=set(_INITIAL))


def complete_model(raw: dict[str, Any]) -> dict[str, Any]:
    """A config whose model section is complete as far as a folder says it; the config itself where
    none does.

    Args:
        raw: nested dict of a YAML file, overrides applied, not validated.

    Raises:
        UserError: `model.from` or, for a model section that is left out, `run.init_from` names no
            model; a setting beside `model.from` that says something else.
    """
    stated = raw.get("model")
    run = raw.get("run")
    run = run if isinstance(run, dict) else {}
    if stated is None or (isinstance(stated, dict) and FROM in stated):
        stated = dict(stated or {})
        named = stated.pop(FROM, None)
        source = named or run.get("init_from")
        setting = "run.init_from" if named is None else "model.from"
        if not isinstance(source, str):
            return raw  # the validation names what is missing
        found = _model_of_source(source, setting, run)
        if named is not None:
            _refuse_others(stated, found, source)
        return {**raw, "model": {**found, **stated}}
    source = run.get("init_from")
    if not isinstance(source, str) or not isinstance(stated, dict):
        return raw
    try:
        return {**raw, "model": {**_model_of_source(source, "run.init_from", run), **stated}}
    except UserError:  # perhaps it is made later; the start of the run reads it and compares
        return raw


def _model_of_source(source: str, setting: str, run: dict[str, Any]) -> dict[str, Any]:
    """Of the source, or where it is gone of the run that started from it."""
    try:
        return model_of(source, setting)
    except UserError:
        written = Path(str(run.get("dir"))) / "config.yaml"
        model = read_yaml(written).get("model") if written.is_file() else None
        if not isinstance(model, dict):
            raise
        return {key: value for key, value in model.items() if key not in _INITIAL}


def _refuse_others(stated: dict[str, Any], found: dict[str, Any], source: str) -> None:
    for key, value in stated.items():
        if key in found and value != found[key] and value != _spelt_out(found, key):
            raise UserError(
                f"model.{key}: {value!r}, but model.from: {source} has {found[key]!r}; leave one of"
                " the two out"
            )


def _spelt_out(model: dict[str, Any], key: str) -> Any:
    """A value of a model section with its default in figures."""
    return ModelSection.model_validate(model).kv_heads if key == "num_query_groups" else model[key]
