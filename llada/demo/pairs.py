"""Question and answer pairs from the docstrings of the Python standard library."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

_LONGEST_QUESTION, _SHORTEST, _LONGEST = 100, 12, 90
"""Characters: the demo's rows hold 96 tokens."""


def write_pairs(files: Sequence[Path], target: Path) -> int:
    """Write {"prompt": ..., "response": ...} lines of every documented function and class of Python
    files; returns how many.
    """
    pairs = dict(pair for file in files for pair in docstring_pairs(file))
    with open(target, "w", encoding="utf-8") as out:
        for question, answer in pairs.items():
            out.write(
                json.dumps({"prompt": question, "response": answer}, ensure_ascii=False) + "\n"
            )
    return len(pairs)


def docstring_pairs(file: Path) -> Iterator[tuple[str, str]]:
    """What each documented function or class of a file does: the first sentence of
    its docstring.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # the library holds broken files on purpose, for its tests
    module = file.stem if file.stem != "__init__" else file.parent.name
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            question, answer = (
                _question(module, node),
                _first_sentence(ast.get_docstring(node) or ""),
            )
            if (
                _SHORTEST <= len(answer) <= _LONGEST
                and len(question) <= _LONGEST_QUESTION
                and answer.isascii()
            ):
                yield question, answer


def _question(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"What is the class {module}.{node.name}?"
    arguments = ", ".join(argument.arg for argument in node.args.args)
    return f"What does {module}.{node.name}({arguments}) do?"


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".") + "." if paragraph else ""
