"""Settings on the command line: `key.sub=value`, set in the nested dict of a config."""

from __future__ import annotations

from typing import Any

from llada.config.strict_yaml import refuse_ambiguous
from llada.errors import UserError


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``key.sub=value`` in the nested dict, in place. Raises UserError for a text that is
    none.
    """
    from omegaconf import OmegaConf

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': write key.sub=value, as in train.steps=100")
    try:
        refuse_ambiguous(text, f"override '{override}'")
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except UserError:
        raise
    except Exception as error:  # any parser complaint is the user's typo
        raise UserError(
            f"override '{override}': the value is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = _child(node, part, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"{key}: '{parents[-1]}' is a single value and has no setting '{last}'")


def change_rate(raw: dict[str, Any], step: int, override: str) -> None:
    """Add a constant learning rate from `step` on; it replaces changes at or after that step."""
    holder: dict[str, Any] = {}
    apply_override(holder, override)
    schedule = raw.setdefault("schedule", {})
    if not isinstance(holder["lr"], int | float) or not isinstance(schedule, dict):
        raise UserError(f"override '{override}': the learning rate must be a number, as in lr=1e-4")
    earlier = [entry for entry in schedule.get("rewinds") or [] if entry["step"] < step]
    schedule["rewinds"] = [*earlier, {"step": step, "lr": float(holder["lr"])}]


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if isinstance(node, dict):
        return node[part]
    raise UserError(f"{key}: '{part}' lies below a single value")


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(
            f"{key}: '{part}' is not an index of this list of {len(node)}; allowed 0 to"
            f" {len(node) - 1}"
        )
    return int(part)
