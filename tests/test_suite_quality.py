"""The tests themselves: every test function asserts something."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
HELPER_PREFIXES = ("assert_", "check_", "expect_")
PYTEST_CHECKS = {"raises", "warns", "fail"}


def _last_name(node: ast.expr) -> str:
    """`f` of `f`, `c` of `a.b.c`, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def _asserts(function: ast.AST) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and _last_name(called.value) == "pytest" and called.attr in PYTEST_CHECKS:
                return True
            # A helper handed to something that runs it (on every rank, in a subprocess) counts like one that is called.
            if any(_last_name(part).startswith(HELPER_PREFIXES) for part in (called, *node.args)):
                return True
    return False


def _silent_tests(source: str) -> list[tuple[int, str]]:
    """Line and name of every test function of `source` that asserts nothing."""
    return [
        (node.lineno, node.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test") and not _asserts(node)
    ]


def test_a_test_that_asserts_nothing_is_found():
    source = """
def test_silent(): run()
class TestGroup:
    def test_silent_method(self): self.run()
def test_assert(): assert run()
def test_raises():
    with pytest.raises(ValueError): run()
def test_helper(): torch.testing.assert_close(a, b)
def test_ranks(): run_ranks(2, check_parity)
def helper(): run()
"""
    assert [name for _, name in _silent_tests(source)] == ["test_silent", "test_silent_method"]


def test_every_test_asserts_something():
    files = sorted([*TESTS.rglob("test_*.py"), *TESTS.rglob("*_test.py")])
    assert Path(__file__) in files
    silent = [
        f"{path.relative_to(TESTS.parent)}:{line} {name}"
        for path in files
        for line, name in _silent_tests(path.read_text(encoding="utf-8"))
    ]
    assert not silent, "tests that assert nothing:\n" + "\n".join(silent)
