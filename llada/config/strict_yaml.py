"""YAML whose values mean the same to every reader.

YAML 1.1, which PyYAML follows, reads 010 as 8, 1:30 as 90 and yes as true; YAML 1.2 reads 10 and
two strings. A file with such a value is refused rather than guessed at.
"""

from __future__ import annotations

import re

import yaml

from llada.errors import UserError

_MAX_VALUES = 100_000
_MAX_DIGITS = 100
_BINARY = re.compile(r"[-+]?0b[01]+$")
_OCTAL = re.compile(r"[-+]?0[0-9]+$")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?$")


def refuse_ambiguous(text: str, where: str) -> None:
    """Check every plain value of a YAML text.

    Args:
        text: content of a file, or a single value.
        where: what the user calls the text, for messages.

    Raises:
        UserError: a value that YAML 1.1 and 1.2 read differently, nesting that is too deep, or far
            too many values.
        yaml.YAMLError: not YAML.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            _check_tree(root, where)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; a config has fewer than ten levels") from None


def _check_tree(root: yaml.Node, where: str) -> None:
    """Check `root` and every value below it, without recursion."""
    pending = [root]
    count = 0
    while pending:
        node = pending.pop()
        # An alias counts each time it is used, as it does once the file is loaded. That is what
        # stops a "billion laughs" file: nine lines whose aliases multiply to a billion values.
        count += 1
        if count > _MAX_VALUES:
            raise UserError(
                f"{where}: more than {_MAX_VALUES:,} values; a config has a few hundred"
            )
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                pending += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
        else:
            _check_value(node, where)


def _check_value(node: yaml.Node, where: str) -> None:
    """Refuse a scalar whose type depends on the YAML version."""
    value = str(node.value)
    type_name = node.tag.rpartition(":")[2]  # "tag:yaml.org,2002:int" -> "int"
    # Quoted and block strings have a style; they are text to every reader.
    if getattr(node, "style", None) is not None or type_name not in ("int", "float", "bool"):
        return
    if node.start_mark.line:  # counted from 0; a single value has one line, which needs no number
        where = f"{where}, line {node.start_mark.line + 1}"

    if type_name == "bool" and value.lower() not in ("true", "false"):
        meaning = "false"
        if value.lower() in ("yes", "on"):
            meaning = "true"
        raise UserError(
            f"{where}: {value} is {meaning} to some YAML readers and text to others; write"
            f" {meaning}, or '{value}' in quotes"
        )
    if len(value) > _MAX_DIGITS:
        raise UserError(
            f"{where}: a number of {len(value):,} characters; no setting takes one of more than"
            f" {_MAX_DIGITS}"
        )
    if "_" in value:
        raise UserError(
            f"{where}: {value} is a number to some YAML readers and text to others; write it"
            f" without _, or '{value}' in quotes"
        )
    # 1:30 may be an int or, as 1:30.5, a float.
    if _SEXAGESIMAL.match(value):
        raise UserError(
            f"{where}: {value} is a number in base 60 to some YAML readers; write the number"
            f" itself, or '{value}' in quotes"
        )
    if type_name == "int" and _BINARY.match(value):
        raise UserError(
            f"{where}: {value} is a binary number to some YAML readers; write it in decimal, or"
            f" '{value}' in quotes"
        )
    if type_name == "int" and _OCTAL.match(value):
        raise UserError(
            f"{where}: {value} is an octal number to some YAML readers; write it without the"
            " leading 0, or in quotes"
        )
