"""Proof that the suite would notice: known mistakes, planted one at a time. The tests that each one
names must fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest

from tests.mutations.mistakes import MISTAKES
from tests.mutations.planting import ROOT, environment


def chosen() -> list[str]:
    """All of them, or with MUTATIONS=I/N in the environment every N-th from number I
    (0-based) on.
    """
    first, _, every = os.environ.get("MUTATIONS", "0/1").partition("/")
    return list(MISTAKES)[int(first) :: int(every)]


class DryRun:
    """A module, or a class in it: what it has can be read, and assigned without effect."""

    def __init__(self, target: object) -> None:
        object.__setattr__(self, "_target", target)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return DryRun(value) if isinstance(value, type) else value

    def __setattr__(self, name: str, value: object) -> None:
        getattr(self._target, name)  # raises if there is nothing to replace


def test_every_mistake_can_be_planted() -> None:
    """What a mistake replaces, text or function, is there. Planting all of them takes longer."""
    assert len(MISTAKES) >= 37
    for mistake in MISTAKES.values():
        assert mistake.path.is_file()
        compile(mistake.source(), str(mistake.path), "exec")
        if mistake.change is not None:
            mistake.change(DryRun(import_module(mistake.module)))


def test_a_mistake_whose_function_is_gone_is_noticed() -> None:
    def renamed(noise: Any) -> None:
        noise.timestep = lambda *others: 0

    with pytest.raises(AttributeError, match="timestep"):
        renamed(DryRun(import_module("llada.noise")))


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen())
def test_the_suite_notices(name: str) -> None:
    mistake = MISTAKES[name]
    # Plain asserts: that a test fails is all that counts, and where CI is set pytest explains the
    # difference of two long lists without a limit, for hours.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            mistake.tests,
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--assert=plain",
        ],
        cwd=ROOT,
        env=environment(name),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 1, (
        f"{mistake.tests} did not fail\n{done.stdout[-2000:]}\n{done.stderr[-500:]}"
    )
    assert "FAILED" in done.stdout
    # The mistake must be what fails, not its planting.
    accidents = (
        "ImportError",
        "SyntaxError",
        "NameError",
        "mutations/mistakes.py",
        "mutations/planting.py",
    )
    assert not any(accident in done.stdout for accident in accidents), done.stdout[-2000:]
