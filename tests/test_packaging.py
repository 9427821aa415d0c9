"""The wheel, installed where the source tree is out of sight, does what the source tree does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("llada", "data_tools", "launch")
SENTENCES = (
    "The cat sat on the mat.",
    "A dog ran over the green hill.",
    "Rain fell on the quiet town all night.",
    "Seven boats left the harbour.",
)


def _run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """Run, assert exit 0, return stdout. The caller's Python settings do not reach the command."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel, which borrows the dependencies of this one."""
    # Build from a copy, so that neither an old build/ nor files of another package get in and the
    # tree stays clean.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, source)
    for package in PACKAGES:
        if (ROOT / package).is_dir():
            shutil.copytree(
                ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
            )
    wheels = tmp_path_factory.mktemp("wheels")
    _run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels], cwd=source
    )
    (wheel,) = wheels.glob("llada-*.whl")

    fresh = tmp_path_factory.mktemp("fresh") / "venv"
    _run([sys.executable, "-m", "venv", "--without-pip", fresh], cwd=fresh.parent)
    python = fresh / "bin" / "python"
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            wheel,
        ],
        cwd=fresh.parent,
    )

    _borrow_dependencies(fresh)
    return fresh


def _borrow_dependencies(fresh: Path) -> Path:
    """Let a virtual environment see the packages of this one, after its own site-packages.

    Returns its own site-packages. A folder named in a .pth file joins sys.path, but its own .pth
    files are not read: the editable install of this project in the parent environment stays
    invisible.
    """
    site_packages = next((fresh / "lib").glob("python*/site-packages"))
    parents = [
        folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")
    ]
    (site_packages / "parent.pth").write_text("".join(f"{folder}\n" for folder in parents))
    return site_packages


def test_an_editable_clone_runs_from_its_parent_folder(tmp_path: Path):
    """There `llada` names the clone itself in the working folder, which comes first in sys.path.

    Python must take the package inside it all the same.
    """
    clone = tmp_path / "llada"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, clone)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    # This is what `pip install --editable` calls.
    build = "from setuptools import build_meta; build_meta.build_editable('..')"
    _run([sys.executable, "-c", build], cwd=clone)
    (wheel,) = tmp_path.glob("llada-*.whl")
    fresh = tmp_path / "venv"
    _run([sys.executable, "-m", "venv", "--without-pip", fresh], cwd=tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(_borrow_dependencies(fresh))
    code = "import llada, launch, data_tools; print(llada.__version__, llada.__file__)"
    version, file = _run([fresh / "bin" / "python", "-c", code], cwd=tmp_path).split()
    assert version and Path(file) == clone / "llada" / "__init__.py"


def test_the_package_comes_from_the_wheel(installed: Path, tmp_path: Path):
    code = (
        "import sys, json, llada, data_tools; print(json.dumps([llada.__file__,"
        " data_tools.__file__, sys.path, llada.__version__]))"
    )
    llada_file, data_tools_file, path, version = json.loads(
        _run([installed / "bin" / "python", "-c", code], cwd=tmp_path)
    )
    assert Path(llada_file).is_relative_to(installed)
    assert Path(data_tools_file).is_relative_to(installed)
    assert str(ROOT) not in path

    import llada

    assert version == llada.__version__


def test_every_module_and_data_file_is_in_the_wheel(installed: Path):
    site_packages = next((installed / "lib").glob("python*/site-packages"))
    kept = {".py", ".json", ".jsonl", ".txt", ".yaml", ".zst", ".typed"}
    expected = {
        file.relative_to(ROOT)
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in kept and "__pycache__" not in file.parts
    }
    assert expected
    missing = sorted(str(file) for file in expected if not (site_packages / file).is_file())
    assert not missing, f"in the source tree but not in the wheel: {missing}"


def test_the_installed_command_prepares_a_corpus(installed: Path, tmp_path: Path):
    llada = installed / "bin" / "llada"
    text = tmp_path / "some.txt"
    text.write_text(
        "\n\n".join(f"{SENTENCES[i % len(SENTENCES)]} Number {i}." for i in range(400)),
        encoding="utf-8",
    )

    _run(
        [
            llada,
            "data",
            "tokenizer",
            "train",
            "--input",
            text,
            "--vocab-size",
            "400",
            "--output",
            "tokenizer",
        ],
        cwd=tmp_path,
    )
    assert any((tmp_path / "tokenizer").iterdir())

    _run(
        [
            llada,
            "data",
            "prepare",
            "--input",
            text,
            "--tokenizer",
            "tokenizer",
            "--output",
            "corpus",
        ],
        cwd=tmp_path,
    )
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest
    assert (tmp_path / "corpus" / "tokenizer").is_dir(), "a prepared corpus carries its tokenizer"


def test_the_installed_command_resolves_a_config(installed: Path, tmp_path: Path):
    shutil.copy2(ROOT / "configs" / "demo" / "pretrain.yaml", tmp_path / "mine.yaml")
    printed = _run(
        [installed / "bin" / "llada", "config", "mine.yaml", "train.steps=7"], cwd=tmp_path
    )
    assert "steps: 7" in printed
    assert "num_layers:" in printed
