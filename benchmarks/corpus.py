"""Real text for measurements of the data tools: the documentation packages of a Debian or Ubuntu
system, as JSON Lines.

    python benchmarks/corpus.py --megabytes 300 --output /var/tmp/documentation.jsonl

Packages are fetched with apt-get and unpacked into a temporary folder; nothing is installed. One
document a file, HTML stripped to its text, the same text once, files in the order of their paths:
the same packages give the same bytes. Size, documents and sha256 are printed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = (
    "linux-doc linux-doc-6.1 python3-doc python3.11-doc postgresql-doc postgresql-doc-15"
    " debian-handbook anarchism git-doc vim-runtime debian-policy developers-reference perl-doc"
    " sqlite3-doc octave-doc python-scipy-doc python-pandas-doc python-sympy-doc python-django-doc"
    " openjdk-17-doc libboost1.74-doc rust-doc ghc-doc"
)
"""In the order in which they are taken, until there is enough text; those that the system does not
offer are passed over.
"""
SUFFIXES = {".html", ".htm", ".txt", ".rst", ".md", ".adoc", ".pod"}
LEFT_OUT = {"script", "style", "head", "nav", "footer"}
BREAKS = {
    "p",
    "div",
    "br",
    "li",
    "tr",
    "pre",
    "dt",
    "dd",
    "section",
    "table",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
}


class Text(HTMLParser):
    """Collects the text of a page; `LEFT_OUT` elements are none."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in LEFT_OUT:
            self._hidden.append(tag)
        elif tag == "body":
            self._hidden.clear()  # a head that is never closed
        elif tag in BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        elif tag in BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def text_of_html(page: str) -> str:
    parser = Text()
    parser.feed(page)
    parser.close()
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(parser.parts)).strip()


def documents(folder: Path) -> Iterator[str]:
    """The text of every file below `folder` that is documentation in UTF-8, by path."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        inner = path.with_suffix("") if path.suffix == ".gz" else path
        if inner.suffix.lower() not in SUFFIXES:
            continue
        try:
            text = (
                gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            ).decode()
        except (UnicodeDecodeError, OSError, EOFError):
            continue
        text = text_of_html(text) if inner.suffix.lower() in (".html", ".htm") else text
        if text.strip():
            yield text


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        sys.exit(
            f"{command[0]} is not here: this needs a Debian or Ubuntu system with apt-get and"
            " dpkg-deb"
        )


def unpacked(package: str, folder: Path) -> Path | None:
    """A package's files, or None when it cannot be had; why not is said."""
    own = folder / package
    own.mkdir()
    fetched = run(["apt-get", "download", package], own)
    archives = list(own.glob("*.deb"))
    if fetched.returncode or not archives:
        print(
            f"{package}: passed over"
            f" ({(fetched.stderr.strip().splitlines() or ['nothing fetched'])[-1]})",
            file=sys.stderr,
        )
        return None
    opened = run(["dpkg-deb", "-x", str(archives[0]), str(own / "files")], own)
    if opened.returncode:
        sys.exit(f"{archives[0].name}: {opened.stderr.strip()}")
    return own / "files"


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink()
        raise


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        default=100,
        help="text at least (10^6 bytes of UTF-8); default 100",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(tempfile.gettempdir()) / "documentation.jsonl",
        help="file to make",
    )
    options = parser.parse_args(arguments)
    seen: set[bytes] = set()
    size, digest = 0, hashlib.sha256()
    partial = options.output.with_name(options.output.name + ".partial")
    with (
        tempfile.TemporaryDirectory() as folder,
        open(partial, "wb") as file,
        removed_on_error(partial),
    ):
        for package in PACKAGES.split():
            if size >= options.megabytes * 1e6:
                break
            files = unpacked(package, Path(folder))
            for text in documents(files) if files else ():
                key = hashlib.sha256(text.encode()).digest()
                if key not in seen:
                    seen.add(key)
                    line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                    file.write(line)
                    digest.update(line)
                    size += len(text.encode())
            print(f"{package}: {size / 1e6:,.1f} MB so far", file=sys.stderr)
        if size < options.megabytes * 1e6:
            found = f"the packages that apt offers hold {size / 1e6:,.1f}"
            sys.exit(
                f"--megabytes: {options.megabytes:g} asked for, {found}; is `apt-get update` due?"
            )
    partial.replace(options.output)
    print(
        f"{options.output}: {size:,} bytes of text, {len(seen):,} documents, sha256"
        f" {digest.hexdigest()}"
    )


if __name__ == "__main__":
    main()
