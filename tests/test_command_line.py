"""The `llada` command as a whole: quick help, and output on any terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    """`llada --help` imports no torch, numpy, Megatron-Core, transformers or pydantic."""
    code = (
        "import sys; import llada.cli; print([m for m in ('torch', 'numpy', 'megatron',"
        " 'transformers', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_terminal_without_unicode_shows_escapes() -> None:
    code = "import sys, llada.cli as cli; cli.app = lambda **_: print('2.5 ± 0.1'); cli.main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2.5 \\xb1 0.1\n"
