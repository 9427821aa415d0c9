"""The tests themselves: they assert, wait for conditions, and leave the standard library alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent
HELPER_PREFIXES = ("assert_", "check_", "expect_")
PYTEST_CHECKS = {"raises", "warns", "fail"}
PATCHES = {"setattr", "delattr", "patch", "object"}
"""Functions of pytest's monkeypatch and of unittest.mock that replace an attribute."""


def _last_name(node: ast.expr) -> str:
    """`f` of `f`, `c` of `a.b.c`, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return ""


def _asserts(function: ast.AST) -> bool:
    """Whether a function contains an assertion, or a call of something that asserts."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = node.func
            if (
                isinstance(called, ast.Attribute)
                and _last_name(called.value) == "pytest"
                and called.attr in PYTEST_CHECKS
            ):
                return True
            # A helper handed to something that runs it (on every rank, in a subprocess) counts like
            # one that is called.
            if any(_last_name(part).startswith(HELPER_PREFIXES) for part in (called, *node.args)):
                return True
    return False


def _silent_tests(source: str) -> list[tuple[int, str]]:
    """Line and name of every test function of `source` that asserts nothing."""
    return [
        (node.lineno, node.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test")
        and not _asserts(node)
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


def _fixed_waits(source: str) -> list[tuple[int, str]]:
    """Line and text of every sleep of a constant time outside of a `while` loop.

    Such a wait is too short on a busy machine and too long on an idle one.
    """
    waits = []

    def visit(node: ast.AST, polling: bool) -> None:
        is_sleep = isinstance(node, ast.Call) and _last_name(node.func) == "sleep"
        if is_sleep and not polling and all(isinstance(part, ast.Constant) for part in node.args):
            waits.append((node.lineno, ast.unparse(node)))
        # The body of a loop polls for its condition; that of a function inside it does not.
        if isinstance(node, ast.While | ast.FunctionDef | ast.AsyncFunctionDef):
            polling = isinstance(node, ast.While)
        for child in ast.iter_child_nodes(node):
            visit(child, polling)

    visit(ast.parse(source), False)
    return waits


def _patches_of_the_standard_library(source: str) -> list[tuple[int, str]]:
    """Line and text of every patch of a module of the standard library.

    Such a patch also affects pytest, subprocess and every thread.
    """
    patches = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and node.args and _last_name(node.func) in PATCHES):
            continue
        target = node.args[0]
        if isinstance(target, ast.Constant) and isinstance(target.value, str):
            # Of "llada.outputs.shutil" the owner is a module of ours, of
            # "llada.outputs.shutil.disk_usage" it is the standard library's.
            owner = target.value.rpartition(".")[0]
        elif _last_name(node.func) != "patch" and isinstance(target, ast.Name | ast.Attribute):
            owner = ast.unparse(target)
        else:
            continue
        if owner.rpartition(".")[2] in sys.stdlib_module_names:
            patches.append((node.lineno, ast.unparse(node)))
    return patches


def _in_all_tests(check: Callable[[str], list[tuple[int, str]]]) -> list[str]:
    return [
        f"{path.relative_to(TESTS.parent)}:{line} {text}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, text in check(path.read_text(encoding="utf-8"))
    ]


def test_fixed_waits_are_found():
    source = """
def test_wait():
    time.sleep(0.3)
    await asyncio.sleep(1)
    for _ in range(3):
        sleep(2)
    while not ready():
        time.sleep(0.01)
    time.sleep(generator.random())
    while True:
        def late():
            time.sleep(5)
"""
    assert [text for _, text in _fixed_waits(source)] == [
        "time.sleep(0.3)",
        "asyncio.sleep(1)",
        "sleep(2)",
        "time.sleep(5)",
    ]


def test_patches_of_the_standard_library_are_found():
    source = """
monkeypatch.setattr(time, "sleep", f)
monkeypatch.setattr(scheduler.time, "sleep", f)
monkeypatch.setattr("llada.outputs.shutil.disk_usage", f)
monkeypatch.delattr("builtins.open")
mock.patch("os.rename", f)
mock.patch.object(os, "rename", f)
monkeypatch.setattr("llada.outputs.shutil", like(shutil, disk_usage=f))
monkeypatch.setattr(scheduler, "shutil", f)
monkeypatch.setattr(module, "open", f)
monkeypatch.setenv("PATH", "")
"""
    assert [line for line, _ in _patches_of_the_standard_library(source)] == [2, 3, 4, 5, 6, 7]


def test_no_test_waits_a_fixed_time():
    waits = _in_all_tests(_fixed_waits)
    assert not waits, "wait for a condition instead:\n" + "\n".join(waits)


def test_no_test_patches_the_standard_library():
    patches = _in_all_tests(_patches_of_the_standard_library)
    assert not patches, (
        "replace the name in the module that uses it (tests/stand_ins.py):\n" + "\n".join(patches)
    )
