"""YAML whose values mean the same to every reader.

YAML 1.1, which the parser follows, reads 010 as 8, 1:30 as 90 and yes as true; YAML 1.2 reads 10 and two texts. A file that depends on
it is refused instead of guessed at.
"""

from __future__ import annotations

import re

import yaml

from llada.errors import UserError

_MOST_VALUES = 100_000
_MOST_DIGITS = 100
_BINARY = re.compile(r"[-+]?0b[01]+$")
_OCTAL = re.compile(r"[-+]?0[0-9]+$")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?$")


def refuse_ambiguous(text: str, where: str) -> None:
    """Check every plain value of a YAML text.

    Args:
        text: of the file, or of one value.
        where: what the user calls it, for messages.

    Raises:
        UserError: a value that YAML 1.1 and 1.2 read differently, nesting that is too deep, or far too many values.
        yaml.YAMLError: not YAML.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        nodes, count = [root] if root is not None else [], 0
        while nodes:
            node = nodes.pop()
            count += 1
            if count > _MOST_VALUES:  # an alias counts each time, as it is read
                raise UserError(f"{where}: more than {_MOST_VALUES:,} values; a config has some hundred")
            if isinstance(node, yaml.MappingNode):
                nodes += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                nodes += node.value
            else:
                _check(node, where)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; a config has less than ten levels") from None


def _check(node: yaml.Node, where: str) -> None:
    kind, value = node.tag.rpartition(":")[2], str(node.value)
    if getattr(node, "style", None) is not None or kind not in ("int", "float", "bool"):
        return
    line = f"{where}, line {node.start_mark.line + 1}" if node.start_mark.line else where
    if kind == "bool" and value.lower() not in ("true", "false"):
        meaning = "true" if value.lower() in ("yes", "on") else "false"
        raise UserError(f"{line}: {value} is {meaning} to some YAML readers and text to others; write {meaning}, or '{value}' in quotes")
    if len(value) > _MOST_DIGITS:
        raise UserError(f"{line}: a number of {len(value):,} characters; no setting takes one of more than {_MOST_DIGITS}")
    if "_" in value:
        raise UserError(f"{line}: {value} is a number to some YAML readers and text to others; write it without _, or '{value}' in quotes")
    if _SEXAGESIMAL.match(value):
        raise UserError(f"{line}: {value} is a number to base 60 to some YAML readers; write the number itself, or '{value}' in quotes")
    if kind == "int" and _BINARY.match(value):
        raise UserError(f"{line}: {value} is a binary number to some YAML readers; write it in decimal, or '{value}' in quotes")
    if kind == "int" and _OCTAL.match(value):
        raise UserError(f"{line}: {value} is an octal number to some YAML readers; write it without the leading 0, or in quotes")
