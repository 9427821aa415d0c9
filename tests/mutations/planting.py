"""Puts a known mistake into a module of the code while that module is imported, in every process of
a test run.

Nothing on the disk changes. `environment(name)` gives the variables of a test run with one mistake:
Python imports `site/sitecustomize.py` at its start, which calls `install`. A fork has the mistake
of the process it was forked from.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

VARIABLE = "LLADA_TESTS_MISTAKE"
ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"

Change = Callable[[ModuleType], None]


class Mistake(NamedTuple):
    """A mistake and what must notice it.

    Attributes:
        module: whose import plants it.
        tests: what pytest is given; at least one of them must fail.
        change: alters the module right after its import, usually by replacing a function; None:
            `rewrite` is used instead.
        rewrite: (old, new), text of the module's source that is replaced, for a mistake in the
            middle of a function.
    """

    module: str
    tests: str
    change: Change | None = None
    rewrite: tuple[str, str] | None = None

    @property
    def path(self) -> Path:
        """The file of the module."""
        return ROOT.joinpath(*self.module.split(".")).with_suffix(".py")

    def source(self) -> str:
        """The module's text with the mistake, if it is one of the text.

        Raises:
            ValueError: the text to be replaced is not there exactly once.
        """
        text = self.path.read_text(encoding="utf-8")
        if self.rewrite is None:
            return text
        old, new = self.rewrite
        rewritten, count = _wherever_lines_break(old).subn(lambda _: new, text)
        if count != 1:
            raise ValueError(f"{self.path} holds the text to be replaced {count} times: {old}")
        return rewritten


def _wherever_lines_break(code: str) -> re.Pattern[str]:
    """A pattern of the same code with other line breaks, and the comma that they may bring along.

    >>> bool(_wherever_lines_break("f(x, y)").fullmatch("f(\\n    x,\\n    y,\\n)"))
    True
    """
    pattern = ""
    for token in re.findall(r"\w+|[^\w\s]", code):
        comma = ",?" if token in ")]}" else ""
        pattern += rf"{comma}\s*{re.escape(token)}" if pattern else re.escape(token)
    return re.compile(pattern)


def environment(name: str) -> dict[str, str]:
    """Variables of a process that is to have the mistake of this name."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(SITE), str(ROOT))), VARIABLE: name}


def install() -> None:
    """Plant the mistake that the environment names, if it names one, as soon as its module is
    imported.
    """
    name = os.environ.get(VARIABLE)
    if name is None:
        return
    from tests.mutations.mistakes import MISTAKES

    sys.meta_path.insert(0, _Planter(MISTAKES[name]))


class _Planter(importlib.abc.MetaPathFinder):
    """Finds one module, and has it loaded with a mistake."""

    def __init__(self, mistake: Mistake) -> None:
        self._mistake = mistake

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._mistake.module:
            return None
        loader = _Loader(fullname, str(self._mistake.path), self._mistake)
        return importlib.util.spec_from_file_location(fullname, self._mistake.path, loader=loader)


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, mistake: Mistake) -> None:
        super().__init__(fullname, path)
        self._mistake = mistake

    def get_code(self, fullname: str) -> CodeType:
        """Compile the file, rewritten if need be; bytecode that was cached on the disk is neither
        read nor written.
        """
        return compile(self._mistake.source(), str(self._mistake.path), "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if self._mistake.change is not None:
            self._mistake.change(module)
