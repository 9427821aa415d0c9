"""The tests themselves: every one asserts something, waits for conditions, and leaves the standard
library as it is.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent
HELPER_PREFIXES = ("assert_", "check_", "expect_")
PYTEST_CHECKS = {"raises", "warns", "fail"}
PATCHES = {"setattr", "delattr", "patch", "object", "multiple"}
"""Of pytest's monkeypatch and of unittest.mock."""


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
    """Line and text of every sleep of a constant time that is not part of a loop which waits for a
    condition.

    Such a wait is too short on a busy machine and too long on an idle one.
    """
    calls = []
    tree = ast.parse(source)
    names = {"sleep"} | {
        name for name, origin in _imported(tree).items() if origin.endswith(".sleep")
    }

    def visit(node: ast.AST, polling: bool) -> None:
        if (
            isinstance(node, ast.Call)
            and _last_name(node.func) in names
            and not polling
            and all(map(_is_fixed, node.args))
        ):
            calls.append((node.lineno, ast.unparse(node)))
        if isinstance(node, ast.While | ast.FunctionDef | ast.AsyncFunctionDef):
            polling = isinstance(node, ast.While)
        for child in ast.iter_child_nodes(node):
            visit(child, polling)

    visit(tree, False)
    return calls


def _is_fixed(value: ast.expr) -> bool:
    """Whether an expression consists of numbers and CONSTANTS alone."""
    parts = [part for part in ast.walk(value) if isinstance(part, ast.expr)]
    return all(
        isinstance(part, ast.Constant | ast.BinOp)
        or (isinstance(part, ast.Name) and part.id.isupper())
        for part in parts
    )


def _imported(tree: ast.AST) -> dict[str, str]:
    """What every imported name of a file stands for, as {"t": "time", "Path": "pathlib.Path"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return names


def _patches_of_the_standard_library(source: str) -> list[tuple[int, str]]:
    """Line and text of every replaced attribute of one of its modules, which is replaced for
    pytest, subprocess and every thread, too.
    """
    tree = ast.parse(source)
    imported = _imported(tree)
    patches = []
    for node in ast.walk(tree):
        for owner in _patched(node):
            root, dot, rest = owner.partition(".")
            origin = imported.get(root, root) + dot + rest
            # `llada.files.shutil` is the library's own module, and so is everything in
            # `pathlib.Path`.
            of_library = origin.partition(".")[0] in sys.stdlib_module_names and root in {
                *imported,
                *sys.stdlib_module_names,
            }
            if of_library or origin.rpartition(".")[2] in sys.stdlib_module_names:
                patches.append((node.lineno, ast.unparse(node)))
    return sorted(patches)


def _patched(node: ast.AST) -> list[str]:
    """Modules and classes, as spelled, of which a statement or call replaces an attribute."""
    if isinstance(node, ast.Assign | ast.Delete):
        owners = [target.value for target in node.targets if isinstance(target, ast.Attribute)]
        return [
            ast.unparse(owner) for owner in owners if isinstance(owner, ast.Name | ast.Attribute)
        ]
    if not (isinstance(node, ast.Call) and _last_name(node.func) in PATCHES):
        return []
    targets = [
        *node.args[:1],
        *(keyword.value for keyword in node.keywords if keyword.arg == "target"),
    ]
    owners = []
    for target in targets:
        if isinstance(target, ast.Constant) and isinstance(target.value, str):
            owners.append(
                target.value.rpartition(".")[0]
            )  # "llada.files.shutil" is a name of ours, "llada.files.shutil.rmtree" is not
        elif _last_name(node.func) != "patch" and isinstance(target, ast.Name | ast.Attribute):
            owners.append(ast.unparse(target))
    return owners


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
    from time import sleep as nap
    nap(1)
    time.sleep(2 * WAIT)
    time.sleep(0.1 * attempt)
"""
    waits = [
        "time.sleep(0.3)",
        "asyncio.sleep(1)",
        "sleep(2)",
        "time.sleep(5)",
        "nap(1)",
        "time.sleep(2 * WAIT)",
    ]
    assert [text for _, text in _fixed_waits(source)] == waits


def test_patches_of_the_standard_library_are_found():
    source = """
monkeypatch.setattr(time, "sleep", f)
monkeypatch.setattr(scheduler.time, "sleep", f)
monkeypatch.setattr("llada.files.shutil.disk_usage", f)
monkeypatch.delattr("builtins.open")
mock.patch("os.rename", f)
mock.patch.object(os, "rename", f)
monkeypatch.setattr("llada.files.shutil", like(shutil, disk_usage=f))
monkeypatch.setattr(scheduler, "shutil", f)
monkeypatch.setattr(module, "open", f)
monkeypatch.setenv("PATH", "")
import time as t
from pathlib import Path
monkeypatch.setattr(t, "sleep", f)
monkeypatch.setattr(target=time, name="sleep", value=f)
monkeypatch.setattr(os.path, "exists", f)
monkeypatch.setattr(Path, "read_text", f)
monkeypatch.setattr("pathlib.Path.read_text", f)
mock.patch.multiple(os, rename=f)
time.sleep = f
self.time = f
module.sleep = f
"""
    assert [line for line, _ in _patches_of_the_standard_library(source)] == [
        *range(2, 8),
        *range(14, 21),
    ]


def test_no_test_waits_a_fixed_time():
    waits = _in_all_tests(_fixed_waits)
    assert not waits, "wait for a condition instead:\n" + "\n".join(waits)


def test_no_test_patches_the_standard_library():
    patches = _in_all_tests(_patches_of_the_standard_library)
    assert not patches, (
        "replace the name in the module that uses it (tests/stand_ins.py):\n" + "\n".join(patches)
    )
