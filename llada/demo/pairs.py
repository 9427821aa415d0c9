"""Question and answer pairs from the docstrings of the Python standard library."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

# In characters: the demo's rows hold 96 tokens.
_LONGEST_QUESTION = 100
_SHORTEST_ANSWER = 12
_LONGEST_ANSWER = 90

_Documented: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def write_pairs(files: Sequence[Path], target: Path) -> int:
    """Write {"prompt": ..., "response": ...} lines of the functions and classes of Python files.

    Returns:
        How many were written. Of equal questions the last one's answer is.
    """
    pairs: dict[str, str] = {}
    for file in files:
        pairs.update(docstring_pairs(file))
    with open(target, "w", encoding="utf-8") as out:
        for question, answer in pairs.items():
            line = json.dumps({"prompt": question, "response": answer}, ensure_ascii=False)
            out.write(line + "\n")
    return len(pairs)


def docstring_pairs(file: Path) -> Iterator[tuple[str, str]]:
    """Ask what each function or class of a file does; its docstring's first sentence answers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # the library contains broken files on purpose, for its tests
    module = file.parent.name if file.stem == "__init__" else file.stem
    # All levels: methods and nested functions too.
    for node in ast.walk(tree):
        if isinstance(node, _Documented):
            question = _question(module, node)
            answer = _first_sentence(ast.get_docstring(node) or "")
            # Long ones would not fit a row, short ones ("See above.") are no answers.
            fits = (
                _SHORTEST_ANSWER <= len(answer) <= _LONGEST_ANSWER
                and len(question) <= _LONGEST_QUESTION
            )
            if fits and answer.isascii():
                yield question, answer


def _question(module: str, node: _Documented) -> str:
    if isinstance(node, ast.ClassDef):
        return f"What is the class {module}.{node.name}?"
    arguments = ", ".join(argument.arg for argument in node.args.args)
    return f"What does {module}.{node.name}({arguments}) do?"


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    if not paragraph:
        return ""
    return paragraph.split(". ")[0].rstrip(".") + "."
