"""The benchmark corpus, with an apt-get and a dpkg-deb that stand in for the system's."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "corpus.py"
PAGE = """<html><head><title>no</title><style>p {}</style></head><body><nav>menu</nav>
<h1>Caf&eacute;</h1><p>one <b>two</b>
three</p><script>var x = "<p>no</p>";</script><pre>a
  b</pre><p>R&amp;D &#8364;</body></html>"""
APT = """#!{python}
import pathlib, sys
package = sys.argv[2]
if package == "linux-doc":
    sys.exit("E: No packages found")
pathlib.Path(package + "_1.deb").write_text(package)
"""
DPKG = """#!{python}
import pathlib, shutil, sys
target = pathlib.Path(sys.argv[3])
shutil.copytree({packages!r} + "/" + pathlib.Path(sys.argv[2]).read_text(), target)
"""


@pytest.fixture()
def system(tmp_path: Path) -> Path:
    """A folder `bin` with both commands; packages linux-doc-6.1 and python3-doc."""
    one, two = tmp_path / "packages" / "linux-doc-6.1", tmp_path / "packages" / "python3-doc"
    for folder in (one / "b", two):
        folder.mkdir(parents=True)
    (one / "b" / "page.html").write_text(PAGE)
    (one / "a.txt.gz").write_bytes(gzip.compress("größer".encode()))
    (one / "picture.png").write_bytes(b"\x89PNG")
    (one / "latin.txt").write_bytes(b"\xff\xfe\xfd")
    (one / "empty.txt").write_text(" \n")
    (two / "again.txt").write_text("größer")
    (two / "new.rst").write_text("new")
    (tmp_path / "bin").mkdir()
    for name, script in (("apt-get", APT), ("dpkg-deb", DPKG)):
        path = tmp_path / "bin" / name
        path.write_text(script.format(python=sys.executable, packages=str(tmp_path / "packages")))
        path.chmod(0o755)
    return tmp_path


def make(
    system: Path, megabytes: float, name: str = "out.jsonl"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, "--megabytes", str(megabytes), "--output", system / name],
        env={**os.environ, "PATH": str(system / "bin")},
        capture_output=True,
        text=True,
    )


def test_the_text_of_packages(system: Path):
    made = make(system, 45 / 1e6)
    assert made.returncode == 0, made.stderr
    texts = [json.loads(line)["text"] for line in (system / "out.jsonl").read_text().splitlines()]
    assert texts == ["größer", "Café\n\none two\nthree\n\na\n  b\n\nR&D €", "new"]
    digest = hashlib.sha256((system / "out.jsonl").read_bytes()).hexdigest()
    size = sum(len(text.encode()) for text in texts)
    assert (
        made.stdout
        == f"{system / 'out.jsonl'}: {size:,} bytes of text, 3 documents, sha256 {digest}\n"
    )
    assert "linux-doc: passed over (E: No packages found)" in made.stderr
    assert "sha256 " + digest in make(system, 45 / 1e6, "again.jsonl").stdout


def test_too_little_text_and_no_apt_are_one_line(system: Path):
    (system / "bin" / "dpkg-deb").unlink()
    missing = make(system, 1)
    assert missing.returncode == 1
    assert (
        missing.stderr.splitlines()[-1]
        == "dpkg-deb is not here: this needs a Debian or Ubuntu system with apt-get and dpkg-deb"
    )
    (system / "bin" / "apt-get").write_text("#!/bin/sh\necho E: offline >&2\nexit 1\n")
    little = make(system, 1)
    assert little.returncode == 1
    assert little.stderr.splitlines()[-1].startswith(
        "--megabytes: 1 asked for, the packages that apt offers hold 0.0"
    )
    assert not list(system.glob("out.jsonl*"))
