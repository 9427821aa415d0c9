"""Settings on the command line: `key.sub=value`, applied to a config that is not validated yet."""

from __future__ import annotations

from typing import Any

from llada.config.strict_yaml import refuse_ambiguous
from llada.errors import UserError, one_line

RawConfig = dict[str, Any]
"""A config as parsed from YAML, before validation: any key may be missing or hold any value."""

_MAX_SHOWN = 60
"""Characters of an override that a message repeats."""


def apply_override(raw: RawConfig, override: str) -> None:
    """Set one ``key.sub=value`` in `raw`, in place.

    Args:
        raw: config, not validated. Sections on the way to the key are created.
        override: the value is YAML; an item of a list is named by its index, as in
            ``data.mixture.0.weight=2``.

    Raises:
        UserError: text of another form, a value that is not YAML, or a key that leads nowhere.
    """
    key, equals, text = override.partition("=")
    if len(override) > _MAX_SHOWN:
        override = f"{override[:_MAX_SHOWN]}…"  # from here on it is only shown
    if not equals or not key:
        raise UserError(f"override '{override}': write key.sub=value, as in train.steps=100")
    value = _parse_value(text, override)

    # Walk down to the mapping or list that holds the last part of the key.
    *parents, last = key.split(".")
    container: object = raw
    for part in parents:
        if isinstance(container, dict) and container.get(part) is None:
            container[part] = {}
        container = _child(container, part, key)

    if isinstance(container, list):
        container[_index(container, last, key)] = value
    elif isinstance(container, dict):
        container[last] = value
    else:
        raise UserError(f"{key}: '{parents[-1]}' is a single value and has no setting '{last}'")


def override_learning_rate(raw: RawConfig, step: int, override: str) -> None:
    """Set a constant learning rate from `step` on, in place; for `--rewind STEP lr=RATE`.

    A change of the learning rate at or after `step` is dropped: the run goes back to before it.
    """
    parsed: RawConfig = {}
    apply_override(parsed, override)
    rate = parsed["lr"]
    schedule = raw.setdefault("schedule", {})
    if not isinstance(rate, int | float) or not isinstance(schedule, dict):
        raise UserError(f"override '{override}': the learning rate must be a number, as in lr=1e-4")
    earlier = [entry for entry in schedule.get("rewinds") or [] if entry["step"] < step]
    schedule["rewinds"] = [*earlier, {"step": step, "lr": float(rate)}]


def _parse_value(text: str, override: str) -> object:
    """The value of an override, read as YAML."""
    from omegaconf import OmegaConf

    try:
        refuse_ambiguous(text, f"override '{override}'")
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        return parsed["value"]  # type: ignore[index,call-overload]
    except UserError:
        raise
    except Exception as error:  # the parsers raise many types; each of them means a typo
        raise UserError(
            f"override '{override}': the value is not valid YAML: {one_line(error)}"
        ) from None


def _child(container: object, part: str, key: str) -> object:
    """What `part` of the dotted `key` names in a mapping or a list."""
    if isinstance(container, list):
        return container[_index(container, part, key)]
    if isinstance(container, dict):
        return container[part]
    raise UserError(f"{key}: '{part}' lies below a single value")


def _index(items: list[object], part: str, key: str) -> int:
    """The index that `part` of the dotted `key` spells."""
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(
            f"{key}: '{part}' is not an index of this list of {len(items)}; allowed 0 to"
            f" {len(items) - 1}"
        )
    return int(part)
