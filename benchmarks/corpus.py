"""Make a corpus of real text for benchmarks of the data tools, as JSON Lines.

    python benchmarks/corpus.py --megabytes 300 --output /var/tmp/documentation.jsonl

The text is that of the documentation packages of a Debian or Ubuntu system. Packages are downloaded
with apt-get and unpacked into a temporary folder; nothing is installed. Each file is one document,
HTML reduced to its text, duplicates removed, files in the order of their paths: the same packages
give the same bytes. Prints size, number of documents and sha256.
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
"""They are taken in this order until there is enough text. Packages that the system does not offer
are skipped."""
SUFFIXES = {".html", ".htm", ".txt", ".rst", ".md", ".adoc", ".pod"}
HIDDEN_ELEMENTS = {"script", "style", "head", "nav", "footer"}
BLOCK_ELEMENTS = {
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


class TextOfPage(HTMLParser):
    """Collects the text of a page, without that of `HIDDEN_ELEMENTS`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._open_hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in HIDDEN_ELEMENTS:
            self._open_hidden.append(tag)
        elif tag == "body":
            # Some pages never close their head.
            self._open_hidden.clear()
        elif tag in BLOCK_ELEMENTS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open_hidden:
            # Elements inside that were never closed end here too.
            del self._open_hidden[self._open_hidden.index(tag) :]
        elif tag in BLOCK_ELEMENTS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._open_hidden:
            self.parts.append(data)


def text_of_html(page: str) -> str:
    """The text of a page, with an empty line where several lines break."""
    parser = TextOfPage()
    parser.feed(page)
    parser.close()
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(parser.parts)).strip()


def documents(folder: Path) -> Iterator[str]:
    """Yield the text of every documentation file in UTF-8 below `folder`, by path."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        # page.html.gz counts as page.html
        compressed = path.suffix == ".gz"
        uncompressed = path.with_suffix("") if compressed else path
        suffix = uncompressed.suffix.lower()
        if suffix not in SUFFIXES:
            continue
        try:
            content = path.read_bytes()
            if compressed:
                content = gzip.decompress(content)
            text = content.decode()
        except (UnicodeDecodeError, OSError, EOFError):
            continue
        if suffix in (".html", ".htm"):
            text = text_of_html(text)
        if text.strip():
            yield text


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the packaging system in `folder`."""
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        sys.exit(
            f"{command[0]} is not here: this needs a Debian or Ubuntu system with apt-get and"
            " dpkg-deb"
        )


def unpack(package: str, folder: Path) -> Path | None:
    """Download and unpack a package.

    Returns:
        The folder of its files, or None, with a message, if it cannot be downloaded.
    """
    own = folder / package
    own.mkdir()
    download = run(["apt-get", "download", package], own)
    archives = list(own.glob("*.deb"))
    if download.returncode or not archives:
        lines = download.stderr.strip().splitlines() or ["nothing fetched"]
        print(f"{package}: passed over ({lines[-1]})", file=sys.stderr)
        return None
    extraction = run(["dpkg-deb", "-x", str(archives[0]), str(own / "files")], own)
    if extraction.returncode:
        sys.exit(f"{archives[0].name}: {extraction.stderr.strip()}")
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
        help="minimum size of the text, in 10^6 bytes of UTF-8 (default: 100)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(tempfile.gettempdir()) / "documentation.jsonl",
        help="file to make",
    )
    options = parser.parse_args(arguments)
    seen: set[bytes] = set()  # digests of the documents so far
    size = 0
    digest = hashlib.sha256()
    # The file gets its name when it is complete.
    partial = options.output.with_name(options.output.name + ".partial")
    with (
        tempfile.TemporaryDirectory() as folder,
        open(partial, "wb") as file,
        removed_on_error(partial),
    ):
        for package in PACKAGES.split():
            if size >= options.megabytes * 1e6:
                break
            files = unpack(package, Path(folder))
            for text in documents(files) if files else ():
                encoded = text.encode()
                key = hashlib.sha256(encoded).digest()
                if key in seen:
                    continue
                seen.add(key)
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                digest.update(line)
                size += len(encoded)
            print(f"{package}: {size / 1e6:,.1f} MB so far", file=sys.stderr)
        if size < options.megabytes * 1e6:
            sys.exit(
                f"--megabytes: {options.megabytes:g} asked for, the packages that apt offers hold"
                f" {size / 1e6:,.1f}; is `apt-get update` due?"
            )
    partial.replace(options.output)
    print(
        f"{options.output}: {size:,} bytes of text, {len(seen):,} documents, sha256"
        f" {digest.hexdigest()}"
    )


if __name__ == "__main__":
    main()
