"""Documents from files and folders: JSON Lines, text and code, plain or compressed (.gz, .zst). One text file is one document."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from llada.errors import UserError, did_you_mean

_PROSE = ".txt .text .md .rst .tex .org .adoc .html .htm"
_CODE = (
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .mjs .ts .tsx .jsx .go .rs .rb .php .pl .pm .sh .bash .sql .lua "
    ".r .jl .swift .cs .fs .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .vim .f90 .asm .s .m .css"
)
TEXT_EXTENSIONS = frozenset(f"{_PROSE} {_CODE}".split())
"""Read as one document each when found in a folder."""
_COMPRESSED = (".gz", ".zst")
_NAMES_SHOWN = 8


@dataclass
class Report:
    """What was read and what was left out.

    Attributes:
        sources: {path, bytes, documents} of every file that gave a document; bytes are those on the disk.
        skipped: files, folders, lines and documents left out, by reason.
    """

    sources: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ReadOptions:
    """How to read.

    Attributes:
        text_field: JSONL field that holds the text.
        extensions: of the files read in folders; None: TEXT_EXTENSIONS. JSONL files are always read.
        skip_bad: count bad JSONL lines, and compressed files that break off, instead of stopping.
        record: makes a document of the JSON value of a line, or raises BadRecord; None: it is the text of `text_field`. With it, only
            JSONL files are read.
    """

    text_field: str = "text"
    extensions: frozenset[str] | None = None
    skip_bad: bool = False
    record: Callable[[Any], Any] | None = None


class BadRecord(Exception):
    """A line of JSON that is not what is asked for.

    Args:
        reason: under which it is counted, a plural: "lines without the field".
        message: what is wrong with this one.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class _File:
    path: Path
    named: bool  # on the command line: a problem with it is the user's mistake

    @property
    def is_jsonl(self) -> bool:
        return _extension(self.path) in (".jsonl", ".json")


def _extension(path: Path) -> str:
    """In lower case, without that of the compression: a.TXT.gz -> .txt."""
    if path.suffix.lower() in _COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower()


def parse_extensions(values: Sequence[str] | None) -> frozenset[str] | None:
    """`py`, `.py` or `py,md` -> {".py", ".md"}; None stays None."""
    if not values:
        return None
    parts = [part.strip().lower() for value in values for part in value.split(",")]
    found = frozenset(_extension(Path("x." + part.lstrip("."))) for part in parts if part.strip("."))
    if not found:
        raise UserError(f"--ext: {' '.join(values)!r} names no extension; give some as in --ext py,md")
    return found


def read(inputs: Sequence[str | Path], options: ReadOptions, report: Report) -> Iterator[Any]:
    """The documents of all inputs, none of them empty: inputs in the given order, folders sorted by path. They are texts, or what
    `options.record` makes.

    Args:
        inputs: files and folders.
        options: how to read.
        report: filled while reading.

    Raises:
        UserError: a named file that is missing, unreadable, not UTF-8 or without a document; a bad JSONL line; no document at all.
    """
    found = False
    for file in _all_files(inputs, options, report):
        before = report.skipped.copy()
        given = False
        for text in _documents(file, options, report):
            given = found = True
            yield text
        if file.named and not given:
            raise UserError(f"--input: no document in {file.path}{_left_out(report.skipped - before)}")
    if not found:
        raise UserError(f"--input: no document in {', '.join(map(str, inputs))}{_left_out(report.skipped)}")


def sample_texts(
    inputs: Sequence[str | Path], extensions: Sequence[str] | None, limit: int, options: ReadOptions | None = None
) -> Iterator[str]:
    """About `limit` characters of text: of many files every n-th, of few what comes first.

    Args:
        inputs: files and folders.
        extensions: as on the command line, None for the default.
        limit: characters in all.
        options: overrides `extensions`.
    """
    options = options or ReadOptions(extensions=parse_extensions(extensions))
    files = _all_files(inputs, options, Report())
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


def _left_out(skipped: Counter[str]) -> str:
    return f" (left out: {', '.join(f'{count:,} {reason}' for reason, count in sorted(skipped.items()))})" if skipped else ""


# -- finding files -----------------------------------------------------------------------------------------------------


def _all_files(inputs: Sequence[str | Path], options: ReadOptions, report: Report) -> list[_File]:
    if not inputs:
        raise UserError("--input: give at least one file or folder")
    seen: set[str] = set()
    for given in inputs:
        place = os.path.realpath(given)
        if place in seen:
            raise UserError(f"--input: '{given}' is given twice; its documents would be read twice")
        seen.add(place)
    return [file for given in inputs for file in _files(Path(given), options, report)]


def _files(path: Path, options: ReadOptions, report: Report) -> Iterator[_File]:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--input: no file or folder '{path}'") from None
    except OSError as error:
        raise UserError(f"--input: {path}: cannot be read ({error.strerror})") from None
    if stat.S_ISREG(found.st_mode):
        if not found.st_size:
            raise UserError(f"--input: {path} is empty")
        named = _File(path, named=True)
        if options.record is not None and not named.is_jsonl:
            raise UserError(f"--input: {path} is not JSON Lines (.jsonl, .json, also with .gz or .zst), which conversations are read from")
        yield named
    elif stat.S_ISDIR(found.st_mode):
        for file in sorted(_walk(path, report)):
            if _wanted(file, options):
                yield _File(file, named=False)
            else:
                report.skipped["files with another extension"] += 1
    else:
        raise UserError(f"--input: '{path}' is neither a file nor a folder")


def _wanted(file: Path, options: ReadOptions) -> bool:
    extension = _extension(file)
    if extension == ".jsonl" or (extension == ".json" and file.suffix.lower() in _COMPRESSED):
        return True
    if options.record is not None:
        return False
    return extension in (TEXT_EXTENSIONS if options.extensions is None else options.extensions)


def _walk(folder: Path, report: Report) -> Iterator[Path]:
    """Regular files below a folder; hidden ones and __pycache__ left out. Links to folders are counted and not followed."""

    def unreadable(error: OSError) -> None:
        if error.filename is None or Path(error.filename) == folder:
            raise UserError(f"--input: {folder}: cannot be read ({error.strerror})") from None
        report.skipped["folders unreadable"] += 1

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        report.skipped.update("links to folders" for name in folders if os.path.islink(os.path.join(root, name)))
        for name in files:
            if name.startswith("."):
                continue
            path = Path(root, name)
            if path.is_file():
                yield path
            else:  # a link to nothing, a pipe, a socket: opening it could wait for ever
                report.skipped["files unreadable"] += 1


# -- reading files -----------------------------------------------------------------------------------------------------


def _documents(file: _File, options: ReadOptions, report: Report) -> Iterator[Any]:
    source: dict[str, Any] = {"path": str(file.path), "bytes": 0, "documents": 0}
    try:
        source["bytes"] = file.path.stat().st_size
        for text in _lines(file, options, report) if file.is_jsonl else _whole(file):
            if text:
                source["documents"] += 1
                yield text
            else:
                report.skipped["documents empty"] += 1
    except UnicodeDecodeError as error:
        _problem(file, report, "files not UTF-8", f"byte {error.start} is not UTF-8; text, code and JSON Lines are read")
    except (OSError, EOFError, zlib.error) as error:
        if not source["documents"]:
            _problem(file, report, "files unreadable", f"cannot be read ({error})")
        elif options.skip_bad:
            report.skipped["files that break off"] += 1
        else:
            raise UserError(f"{file.path}: breaks off after {source['documents']:,} documents ({error}); --skip-bad keeps those") from None
    if source["documents"]:
        report.sources.append(source)


def _problem(file: _File, report: Report, reason: str, message: str) -> None:
    if file.named:
        raise UserError(f"--input: {file.path}: {message}") from None
    report.skipped[reason] += 1


def _whole(file: _File) -> Iterator[str]:
    with _open(file.path) as stream:
        yield stream.read().decode("utf-8-sig")


def _lines(file: _File, options: ReadOptions, report: Report) -> Iterator[Any]:
    """The document of every line; blank lines are passed over."""
    import orjson

    def text_of(value: Any) -> str:
        return string_field(value, options.text_field, "choose it with --text-field")

    record = options.record or text_of
    with _open(file.path) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield record(_json(line, orjson.loads))
            except BadRecord as problem:
                if not options.skip_bad:
                    raise UserError(f"{file.path}:{number}: {problem}, or count bad lines with --skip-bad") from None
                report.skipped[problem.reason] += 1


def _json(line: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(line)
    except ValueError as error:
        raise BadRecord("lines not JSON", f"not JSON ({error}); every line must be one JSON object") from None


def string_field(value: Any, name: str, remedy: str) -> str:
    """The string in a field of a JSON object.

    Args:
        value: of the line.
        name: of the field.
        remedy: what the user can do, for messages.

    Raises:
        BadRecord: not an object, no such field, not a string.
    """
    if not isinstance(value, dict):
        raise BadRecord("lines without the field", f"a JSON {type(value).__name__}, not an object with the field '{name}'; {remedy}")
    if name not in value:
        names = ", ".join(list(value)[:_NAMES_SHOWN]) + (", ..." if len(value) > _NAMES_SHOWN else "")
        raise BadRecord("lines without the field", f"field '{name}' is missing, there are: {names}{did_you_mean(name, value)}; {remedy}")
    text = value[name]
    if not isinstance(text, str):
        raise BadRecord("lines whose field is not a string", f"field '{name}' is not a string but {type(text).__name__}; {remedy}")
    return text


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdFile(path), 1 << 18)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file of any number of frames. Unlike zstandard's own reader it does not take a file that breaks off for a whole one."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 (outlives this method; closed by close)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error: type[Exception] = zstandard.ZstdError
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(1 << 16)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise OSError(str(error)) from None
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()
