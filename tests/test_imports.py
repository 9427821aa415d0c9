"""Imports run one way: from the command line down to the modules that import nothing of ours."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LAYERS = (
    {"llada.__main__", "llada.cli", "llada.commands"},
    {"launch", "llada.demo"},
    {"llada.sampling", "llada.training"},
    {"llada.hf"},
    {"llada.evaluation"},
    {"llada.engine"},
    {"data_tools", "llada.checkpoint", "llada.doctor", "llada.planning"},
    {"llada.chat", "llada.data", "llada.model"},
    {
        "llada",
        "llada.config",
        "llada.device",
        "llada.objectives",
        "llada.outputs",
        "llada.tokenizer",
    },
    {
        "llada.arithmetic",
        "llada.arrays",
        "llada.errors",
        "llada.events",
        "llada.exits",
        "llada.failures",
        "llada.files",
        "llada.formatting",
        "llada.noise",
        "llada.process_rank",
        "llada.revision",
        "llada.torchrun",
        "llada.types",
    },
)
"""Packages and single modules, the highest first; each imports from its own layer and lower ones.

Everything may import `llada` itself, which holds the version.
"""
NO_MEGATRON = ("llada.noise", "llada.objectives", "llada.data", "llada.config", "data_tools")
COPIED_INTO_EXPORTS = ("configuration_llada", "modeling_llada", "generation_llada")


@cache
def modules() -> dict[str, Path]:
    """Return name -> file of every module of the project."""
    named = {}
    for top in ("llada", "data_tools", "launch"):
        for path in (REPOSITORY / top).rglob("*.py"):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            named[".".join(parts)] = path
    return named


def imports(path: Path, everywhere: bool = True) -> Iterator[str]:
    """Return the names of the imported modules.

    Args:
        path: a Python file.
        everywhere: imports inside functions and under `if` count too, not only those at the top,
            which run when the module is imported.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = modules()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                # `from llada import events` imports a module, `from llada.noise import I64` a name.
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in named else node.module


def package_of(module: str) -> str:
    """Return the name in LAYERS: llada.data.sft is in llada.data, launch.job.rank in launch."""
    parts = module.split(".")
    if parts[0] == "llada":
        return ".".join(parts[:2])
    return parts[0]


def layer_of(package: str) -> int:
    for layer, packages in enumerate(LAYERS):
        if package in packages:
            return layer
    pytest.fail(f"{package} is in no layer of {Path(__file__).name}: add it to one")


def test_every_import_goes_down() -> None:
    named = modules()
    upward = []
    for module, path in named.items():
        own = package_of(module)
        for imported in imports(path):
            if imported not in named or imported == "llada":
                continue
            if layer_of(package_of(imported)) < layer_of(own):
                upward.append(f"{module} imports {imported}")
    assert not upward


def test_no_circles() -> None:
    """Neither between packages, by any import, nor between files, by those at their top."""
    named = modules()
    packages: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}
    for module, path in named.items():
        own = package_of(module)
        used = {package_of(imported) for imported in imports(path) if imported in named}
        packages.setdefault(own, set()).update(used - {own, "llada"})
        at_top = set(imports(path, everywhere=False))
        files[module] = {name for name in at_top if name in named} - {module}
    # `static_order` raises CycleError, which names the circle.
    assert set(TopologicalSorter(packages).static_order()) == set(packages)
    assert set(TopologicalSorter(files).static_order()) == set(files)


@pytest.mark.parametrize("package", NO_MEGATRON)
def test_no_megatron_below_the_model(package: str) -> None:
    for module, path in modules().items():
        if package_of(module) == package:
            assert not [name for name in imports(path) if name.startswith("megatron")], module


@pytest.mark.parametrize("name", COPIED_INTO_EXPORTS)
def test_an_export_needs_nothing_of_ours(name: str) -> None:
    """Every exported folder carries a copy of these files, which import only each other."""
    ours = ("llada", "data_tools", "launch")
    for imported in imports(modules()[f"llada.hf.{name}"]):
        assert not imported.startswith(ours), imported
