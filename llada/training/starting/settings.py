"""What makes two runs the same: settings, schedule and versions compared with a checkpoint's."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from llada.checkpoint.format import CheckpointState
from llada.config import RunConfig, build_config, dump_config
from llada.data.training_data import TrainingData
from llada.errors import UserError
from llada.model.attention import kernel_name
from llada.process_rank import world_from_environment
from llada.training.schedule import Schedule
from llada.types import JsonObject

MAY_CHANGE = (
    "run",
    "train.steps",
    "train.max_skipped",
    "logging",
    "checkpoint",
    "validation",
    "parallel",
    "batch.micro",
    "data.verify_bytes",
    "data.mixture",
    "schedule",
)
"""Settings that a resumed run may change.

The data is compared by its fingerprint, the schedule by the learning rates that were used already.
"""
_SPIKE_SETTINGS = (
    "train.spike_sigma",
    "train.spike_loss_factor",
    "train.spike_norm_factor",
    "train.spike_window",
)
"""Settings that a resumed run may change unless it has train.skip_spikes: without that they decide
only which steps are named."""
_CONSTANTS = ("rope_theta", "norm_eps")
"""Settings of the model that no tensor's shape shows. Another value silently makes another model of
the same weights."""


def first_difference(
    old: JsonObject, new: JsonObject, allowed: tuple[str, ...], prefix: str = ""
) -> str | None:
    """Return the first setting that differs between two nested configs, as `key: old -> new`.

    Args:
        old, new: configs.
        allowed: settings and sections that may differ, by their full names.
        prefix: full name of the section that `old` and `new` are, with a dot.
    """
    for key in {**old, **new}:
        path = f"{prefix}{key}"
        if any(path == name or path.startswith(name + ".") for name in allowed):
            continue
        before = old.get(key)
        after = new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            difference = first_difference(before, after, allowed, path + ".")
            if difference:
                return difference
        elif before != after:
            return f"{path}: {before!r} -> {after!r}"
    return None


def arithmetic_versions(config: RunConfig, threads: int) -> dict[str, str]:
    """Return what decides the arithmetic besides the config: package versions and hardware."""
    versions = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    versions["run.threads"] = str(threads)
    versions["machine"] = platform.machine()
    if torch.cuda.is_available():
        versions["cuda"] = str(torch.version.cuda)
        versions["gpu"] = torch.cuda.get_device_name()
        versions["attention"] = kernel_name()
        versions["run.deterministic"] = str(config.run.deterministic)
    return versions


def find_changes(
    config: RunConfig,
    data: TrainingData,
    folder: Path,
    state: CheckpointState,
    threads: int | None,
) -> list[str]:
    """Return what differs from a checkpoint and would make the run another one.

    Args:
        config, data: the run's config and data.
        folder, state: the checkpoint and its state.
        threads: CPU threads of this rank; None on a machine that only submits the run, whose
            versions are not compared.

    Raises:
        UserError: this version does not allow a setting of the checkpoint any more.
    """
    # Settings. A checkpoint of an older version lacks the newer ones, which then have their
    # defaults.
    old = _config_of_checkpoint(state.config, folder)
    changes = []
    allowed: tuple[str, ...] = MAY_CHANGE
    if not config.train.skip_spikes:
        allowed += _SPIKE_SETTINGS
    difference = first_difference(dump_config(old), dump_config(config), allowed)
    if difference is not None:
        changes.append(difference)
    # Data, wherever it is stored now.
    if state.data != data.fingerprint:
        changes.append(f"data.mixture: data {state.data} -> {data.fingerprint}")
    # The learning rates of the steps that are done. Those of later steps may change.
    changed_rate = _first_changed_rate(old, config, state.step)
    if changed_rate is not None:
        changes.append(changed_rate)
    if threads is None:  # this machine's versions say nothing about the one that will run it
        return changes
    # Software and hardware.
    current = arithmetic_versions(config, threads)
    if not _threads_matter(config, old, state):
        del current["run.threads"]
    for key, now in current.items():
        before = state.versions.get(key)
        if before != now:
            changes.append(f"{key}: {before} -> {now}")
    return changes


def _first_changed_rate(old: RunConfig, new: RunConfig, steps: int) -> str | None:
    """Return the first of `steps` past steps that would have another learning rate now."""
    old_schedule = Schedule(old.schedule, old.tokens_per_step)
    new_schedule = Schedule(new.schedule, new.tokens_per_step)
    for step in range(steps):
        before = old_schedule.learning_rate(step)
        now = new_schedule.learning_rate(step)
        if before != now:
            return f"schedule.stages: learning rate of step {step + 1}: {before:g} -> {now:g}"
    return None


def _config_of_checkpoint(saved: JsonObject, folder: Path) -> RunConfig:
    try:
        return build_config(saved)
    except UserError as error:
        raise UserError(
            f"resume from {folder}: this version of llada does not allow a setting that it was"
            f" saved with, {error}; continue with the version that wrote it, or start another run"
            " from its weights (run.init_from)"
        ) from None


def _threads_matter(config: RunConfig, old: RunConfig, state: CheckpointState) -> bool:
    """Return whether another number of CPU threads per rank would make another run.

    It does where both configs set it. Where the machine decides it, it changes with the number of
    ranks; then the layout has changed too, which is allowed. On the same layout it decides the
    order of sums on the CPU.
    """
    if config.run.threads and old.run.threads:
        return True
    world_size = world_from_environment().world_size
    # 0: a version that did not record it wrote the checkpoint.
    same_layout = state.ranks in (0, world_size) and config.parallel == old.parallel
    return same_layout and not torch.cuda.is_available()


# -- the model -------------------------------------------------------------------------------------


def refuse_other_architecture(subject: str, config: RunConfig, old: JsonObject) -> None:
    """Refuse weights whose shapes are not those of the run's model.

    Args:
        subject: begins the message: what holds the weights.
        config: the run's config.
        old: model section of the weights.

    Raises:
        UserError: the two differ; both are named.
    """
    new = dump_config(config)["model"]
    allowed = tuple(f"model.{key}" for key in ("embedding_init_std", *_CONSTANTS))
    difference = first_difference(
        _with_query_groups(old), _with_query_groups(new), allowed, "model."
    )
    if difference:
        raise UserError(
            f"{subject} has a different architecture ({_shape(old)}) from the config"
            f" ({_shape(new)}); the first difference is {difference}"
        )


def _with_query_groups(model: JsonObject) -> JsonObject:
    """Return a model section in which the number of key/value heads is a number."""
    groups = model.get("num_query_groups") or model.get("num_attention_heads")
    return {**model, "num_query_groups": groups}


def _shape(model: JsonObject) -> str:
    return (
        f"{model['num_layers']} layers of width {model['hidden_size']}, vocabulary"
        f" {model['vocab_size']}"
    )


def changed_constants(
    source: Path, config: RunConfig, old: JsonObject, allow_changed: bool
) -> list[str]:
    """Return which constants of the model differ from those that the weights were trained with.

    Args:
        source: folder of the weights.
        config: the run's config.
        old: model section of the weights.
        allow_changed: report differences instead of refusing them.

    Raises:
        UserError: a constant differs, and that is not allowed.
    """
    changed = []
    for key in _CONSTANTS:
        before = old.get(key)
        now = getattr(config.model, key)
        if before is None or before == now:
            continue
        if not allow_changed:
            raise UserError(
                f"model.{key}: {now!r}, but run.init_from: {source} has {before!r}; remove it"
                " from the config to use that value, or pass --allow-changed if the change is"
                " intended"
            )
        changed.append(f"model.{key}: {before!r} -> {now!r}")
    return changed
