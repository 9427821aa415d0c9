"""Documents from files and folders: JSONL (plain, .gz, .zst), text and code. One text file is one document."""

from __future__ import annotations

import gzip
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from llada.errors import UserError

_PROSE = ".txt .text .md .rst .tex .org .adoc"
_CODE = (
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .mjs .ts .tsx .jsx .go .rs .rb .php .pl .pm .sh .bash .sql .lua "
    ".r .jl .swift .cs .fs .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .vim .f90 .asm .s .m"
)
TEXT_EXTENSIONS = frozenset(f"{_PROSE} {_CODE}".split())
"""Read as one document each when found in a folder."""
_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass
class Report:
    """What was read and what was left out.

    Attributes:
        sources: {path, bytes, documents} of every file that gave a document.
        skipped: files or lines left out, by reason.
    """

    sources: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ReadOptions:
    """How to read.

    Attributes:
        text_field: JSONL field that holds the text.
        extensions: of the files read in folders; None: TEXT_EXTENSIONS. JSONL files are always read.
        skip_bad: count bad JSONL lines instead of refusing the file.
    """

    text_field: str = "text"
    extensions: frozenset[str] | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class _File:
    path: Path
    named: bool  # on the command line: a problem with it is the user's mistake


def parse_extensions(values: Sequence[str] | None) -> frozenset[str] | None:
    """`py`, `.py` or `py,md` -> {".py", ".md"}; None stays None."""
    if not values:
        return None
    return frozenset("." + part.strip().lstrip(".").lower() for value in values for part in value.split(",") if part.strip())


def read(inputs: Sequence[str | Path], options: ReadOptions, report: Report) -> Iterator[str]:
    """The documents of all inputs: inputs in the given order, folders sorted by path.

    Args:
        inputs: files and folders.
        options: how to read.
        report: filled while reading.

    Raises:
        UserError: a named file that is missing, unreadable, not UTF-8 or empty; a bad JSONL line; no document at all.
    """
    if not inputs:
        raise UserError("--input: give at least one file or folder")
    found = False
    for file in [file for given in inputs for file in _files(Path(given), options, report)]:
        for text in _documents(file, options, report):
            found = True
            yield text
    if not found:
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(report.skipped.items()))
        raise UserError(f"--input: no document in {', '.join(map(str, inputs))}" + (f" ({left_out})" if left_out else ""))


def sample_texts(
    inputs: Sequence[str | Path], extensions: Sequence[str] | None, limit: int, options: ReadOptions | None = None
) -> Iterator[str]:
    """About `limit` bytes of text spread over all inputs: of every file, the share of its size; JSONL is read from the start.

    Args:
        inputs: files and folders.
        extensions: as on the command line, None for the default.
        limit: bytes in all.
        options: overrides `extensions`.
    """
    options = options or ReadOptions(extensions=parse_extensions(extensions))
    files = [file for given in inputs for file in _files(Path(given), options, Report())]
    total = sum(file.path.stat().st_size for file in files)
    every = max(1, -(-total // limit))
    chosen = files[::every] if len(files) >= 2 * every else files
    left = limit
    for file in chosen:
        for text in _documents(file, options, Report()):
            if left <= 0:
                return
            left -= len(text)
            yield text


def _files(path: Path, options: ReadOptions, report: Report) -> Iterator[_File]:
    if path.is_dir():
        wanted = TEXT_EXTENSIONS if options.extensions is None else options.extensions
        for file in sorted(_walk(path)):
            if file.suffix.lower() in wanted or file.name.endswith(_JSONL):
                yield _File(file, named=False)
            else:
                report.skipped["files with another extension"] += 1
    elif path.exists():
        yield _File(path, named=True)
    else:
        raise UserError(f"--input: no file or folder '{path}'")


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files below a folder; hidden ones and __pycache__ left out, links to folders not followed."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(root, name) for name in files if not name.startswith("."))


def _documents(file: _File, options: ReadOptions, report: Report) -> Iterator[str]:
    source = {"path": str(file.path), "bytes": 0, "documents": 0}
    try:
        source["bytes"] = file.path.stat().st_size
        texts = _lines(file, options, report) if file.path.name.endswith(_JSONL) else _whole(file)
        for text in texts:
            if not text:
                if file.named and not file.path.name.endswith(_JSONL):
                    raise UserError(f"--input: {file.path} is empty")
                report.skipped["empty documents"] += 1
                continue
            source["documents"] += 1
            yield text
    except UnicodeDecodeError as error:
        _problem(file, report, "not UTF-8", f"byte {error.start} is not UTF-8")
    except (OSError, EOFError) as error:
        _problem(file, report, "unreadable", f"cannot be read ({error})")
    if source["documents"]:
        report.sources.append(source)


def _problem(file: _File, report: Report, reason: str, message: str) -> None:
    if file.named:
        raise UserError(f"--input: {file.path}: {message}") from None
    report.skipped[f"files {reason}"] += 1


def _whole(file: _File) -> Iterator[str]:
    yield file.path.read_bytes().decode("utf-8")


def _lines(file: _File, options: ReadOptions, report: Report) -> Iterator[str]:
    """The text field of every line; empty lines are passed over."""
    import orjson

    with _open(file.path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = orjson.loads(line)
            except ValueError as error:
                _bad_line(file, number, options, report, "not JSON", f"not JSON ({error})")
                continue
            text = value.get(options.text_field) if isinstance(value, dict) else None
            if isinstance(text, str):
                yield text
                continue
            names = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            problem = "is not a string" if text is not None else f"is missing (it has: {names})"
            _bad_line(
                file, number, options, report, "without the field", f"field '{options.text_field}' {problem}; choose it with --text-field"
            )


def _bad_line(file: _File, number: int, options: ReadOptions, report: Report, reason: str, message: str) -> None:
    if not options.skip_bad:
        raise UserError(f"{file.path}:{number}: {message}, or count bad lines with --skip-bad")
    report.skipped[f"lines {reason}"] += 1


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(_ZstdFile(zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), closefd=True)))
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """zstandard's reader as a raw stream, so that BufferedReader can split it into lines; its errors become OSError."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            data = self._reader.read(len(buffer))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._reader.close()
        super().close()
