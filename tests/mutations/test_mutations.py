"""Proof that the suite would notice: known mistakes, planted one at a time. The tests that each one
names must fail.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.mutations.mistakes import MISTAKES
from tests.mutations.planting import ROOT, environment


def chosen() -> list[str]:
    """All of them, or with MUTATIONS=I/N in the environment every N-th from number I
    (0-based) on.
    """
    first, _, every = os.environ.get("MUTATIONS", "0/1").partition("/")
    return list(MISTAKES)[int(first) :: int(every)]


def test_every_text_that_a_mistake_replaces_is_there() -> None:
    """In every change's time; planting them all takes longer."""
    assert len(MISTAKES) >= 37
    for mistake in MISTAKES.values():
        assert mistake.path.is_file()
        mistake.source()


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
