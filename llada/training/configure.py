"""Loading a config as the commands do: the initial weights complete its model section.

A converted model keeps its meaning only with its own rotary base and norm epsilon. So settings that
a config leaves out come from the folder that `run.init_from` names, not from the defaults, and the
whole section may be left out.
"""

from __future__ import annotations

from pathlib import Path

from llada.config import RunConfig, Task, build_config, read_config, read_yaml
from llada.config.sections import ModelSection
from llada.errors import UserError
from llada.types import JsonObject

FROM = "from"
"""Key of the model section that names a folder to take it from; its settings replace the key."""
_INITIAL = ("embedding_init_std",)
"""Settings of initial weights, which say nothing about a model that is trained already."""


def load_config(
    path: str | Path,
    overrides: list[str] | None = None,
    task: Task | None = None,
    rewind: int | None = None,
) -> RunConfig:
    """Read a YAML config, apply overrides, complete the model section, and validate it.

    The arguments are those of `llada.config.read_config`.

    Raises:
        UserError: anything wrong, in one line that names the setting.
    """
    return build_config(complete_model(read_config(path, overrides, task, rewind)))


def model_section_of(path: str | Path, setting: str) -> JsonObject:
    """Return the model section of a Hugging Face folder, a checkpoint or a run's latest one.

    Args:
        path: path of the model.
        setting: what the user calls `path`, for messages.

    Raises:
        UserError: there is no model.
    """
    # These import torch, and most configs name no model.
    from llada.checkpoint.format import read_state, resolve_checkpoint, trained_config
    from llada.hf.folder import is_folder, read_model

    if is_folder(path):
        model = read_model(path, setting).model
    else:
        try:
            model = trained_config(read_state(resolve_checkpoint(path))).model
        except UserError as error:
            raise UserError(f"{setting}: {str(error).removeprefix('checkpoint: ')}") from None
    return model.model_dump(exclude=set(_INITIAL))


def complete_model(raw: JsonObject) -> JsonObject:
    """Complete a config's model section from the folder that it names, as far as there is one.

    Args:
        raw: nested dict of a YAML file, overrides applied, not validated.

    Returns:
        The completed config; `raw` itself where it names no folder.

    Raises:
        UserError: `model.from` or, for a model section that is left out, `run.init_from` names no
            model; a setting beside `model.from` contradicts the folder.
    """
    stated = raw.get("model")
    run = raw.get("run")
    if not isinstance(run, dict):
        run = {}
    if isinstance(stated, dict) and FROM not in stated:
        return _fill_gaps(raw, stated, run)
    if stated is not None and not isinstance(stated, dict):
        return raw  # the validation refuses it
    # No section, or one that names a folder: the settings come from there.
    settings = dict(stated or {})
    model_from = settings.pop(FROM, None)
    source = model_from or run.get("init_from")
    if not isinstance(source, str):
        return raw  # the validation names what is missing
    if model_from is None:
        model = _model_of_source(source, "run.init_from", run)
    else:
        model = _model_of_source(source, "model.from", run)
        _refuse_contradictions(settings, model, source)
    return {**raw, "model": {**model, **settings}}


def _fill_gaps(raw: JsonObject, stated: JsonObject, run: JsonObject) -> JsonObject:
    """Take the settings that a model section leaves out from `run.init_from`, where it is there."""
    source = run.get("init_from")
    if not isinstance(source, str):
        return raw
    try:
        model = _model_of_source(source, "run.init_from", run)
    except UserError:  # perhaps it is made later; the start of the run reads it and compares
        return raw
    return {**raw, "model": {**model, **stated}}


def _model_of_source(source: str, setting: str, run: JsonObject) -> JsonObject:
    """Return the model section of the source; if that is gone, of the run that started from it."""
    try:
        return model_section_of(source, setting)
    except UserError:
        # A run that resumes no longer needs the folder that it once started from.
        saved = Path(str(run.get("dir"))) / "config.yaml"
        if not saved.is_file():
            raise
        model = read_yaml(saved).get("model")
        if not isinstance(model, dict):
            raise
        return {key: value for key, value in model.items() if key not in _INITIAL}


def _refuse_contradictions(stated: JsonObject, model: JsonObject, source: str) -> None:
    """Raise UserError for a setting beside `model.from` that is not the folder's."""
    for key, value in stated.items():
        if key not in model or value == model[key]:
            continue
        # Left out, the number of key/value heads is that of the attention heads: stating it as a
        # number is no contradiction.
        if key == "num_query_groups" and value == ModelSection.model_validate(model).kv_heads:
            continue
        raise UserError(
            f"model.{key}: {value!r}, but model.from: {source} has {model[key]!r}; leave one of"
            " the two out"
        )
