"""Documents from sources: JSON Lines, JSON arrays, text and code, plain or compressed (.gz, .zst);
tables are in `data_tools.readers.tables`.

A source is read in slices (`Slice`), so that a large one can be shared out: of plain JSON Lines
those lines that start in a range of bytes, of Parquet some row groups, of Arrow some record
batches, of a dataset some rows. A compressed file and an array are read whole.
"""

from __future__ import annotations

import codecs
import functools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.readers.compression import open_file
from data_tools.readers.json_arrays import BrokenArray, elements
from data_tools.readers.sources import (
    ARRAY,
    JSONL,
    TEXT,
    Extent,
    InputFile,
    Slice,
    find_sources,
    parse_extensions,
)
from llada.errors import UserError, did_you_mean

_RATIO = 4
"""Bytes of text that a byte of a compressed file is taken for, when work is shared out."""
_NAMES_SHOWN = 8
_LONGEST = 1 << 40
_ARRAYS = "a file that is one JSON array has to end with .json"
_LISTED = 10_000
"""Entries of the list of what is left out, per unit of work; the counts go on."""


@dataclass
class Report:
    """What was read and what was left out.

    Attributes:
        sources: {path, bytes, documents} of every source that gave a document; bytes are those on
            the disk.
        skipped: files, folders, lines and documents left out, by reason.
        listed: {path, line, reason, message} of lines and documents left out, the first 10,000; of
            an array, `line` is the number of the element.
    """

    sources: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, Any]] = field(default_factory=list)

    def leave_out(self, path: str, line: int | None, reason: str, message: str) -> None:
        """Count and list one line or document."""
        self.skipped[reason] += 1
        if len(self.listed) < _LISTED:
            self.listed.append({"path": path, "line": line, "reason": reason, "message": message})


@dataclass(frozen=True)
class ReadOptions:
    """How to read.

    Attributes:
        text_field: field or column that holds the text.
        extensions: of the files read in folders; None: TEXT_EXTENSIONS. JSON Lines and tables are
            always read.
        skip_bad: count bad lines, and compressed files that break off, instead of stopping.
        min_length, max_length: bytes of UTF-8 that a text must have; shorter and longer ones are
        left out and counted. Also bounds
            memory: a line that is longer than `max_line` is passed over unread.
        split, name, revision, streaming: of `hf:` inputs, as `datasets.load_dataset` has them.
        structured: documents are records with several fields, not texts: only JSON Lines and tables
            are read, all columns of these, and the lengths do not matter.
    """

    text_field: str = "text"
    extensions: frozenset[str] | None = None
    skip_bad: bool = False
    min_length: int = 1
    max_length: int = 64 << 20
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    streaming: bool = False
    structured: bool = False

    def __post_init__(self) -> None:
        if self.min_length < 1:
            raise UserError(f"--min-length: {self.min_length} is less than 1 byte")
        if self.max_length < self.min_length:
            raise UserError(
                f"--max-length: {self.max_length} is less than --min-length, {self.min_length}"
            )
        if self.max_length > _LONGEST:
            raise UserError(
                f"--max-length: {self.max_length} is more than {_LONGEST:,} bytes, and a document"
                " has to fit into memory"
            )

    @property
    def max_line(self) -> int:
        """Bytes of the longest line that is read: the longest text with every byte escaped, and a
        MiB of other fields.
        """
        return 6 * self.max_length + (1 << 20)


Record = Callable[[Any, tuple[str, int]], Any]
"""Makes a document of the JSON value of a line, or of a row as a dict, found at (path, line); or
raises BadRecord.
"""


class BadRecord(Exception):
    """A line of JSON, or a row, that is not what is asked for.

    Args:
        reason: under which it is counted, a plural: "lines without the field".
        message: what is wrong with this one.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read(inputs: Sequence[str | Path], options: ReadOptions, report: Report) -> Iterator[str]:
    """The texts of all inputs, none of them empty: inputs in the given order, folders sorted by
    path.

    Args:
        inputs: see `find_sources`.
        options: how to read.
        report: filled while reading.

    Raises:
        UserError: a named file that is missing, unreadable, not UTF-8 or without a document; a bad
            line; no document at all.
    """
    found = False
    for source in find_sources(inputs, options, report):
        before = report.skipped.copy()
        given = False
        for document in read_slice(source, None, options, report):
            given = found = True
            yield document
        if source.named and not given:
            raise no_document(source.path, report.skipped - before)
    if not found:
        raise no_document(", ".join(map(str, inputs)), report.skipped)


def sample_texts(
    inputs: Sequence[str | Path],
    extensions: Sequence[str] | None,
    limit: int,
    options: ReadOptions | None = None,
) -> Iterator[str]:
    """About `limit` characters of text: of many files every n-th, of few what comes first.

    Args:
        inputs: files and folders.
        extensions: as on the command line, None for the default.
        limit: characters in all.
        options: overrides `extensions`.
    """
    options = options or ReadOptions(extensions=parse_extensions(extensions))
    sources = find_sources(inputs, options, Report())
    return sample_of(sources, limit, options)


def sample_of(sources: Sequence[InputFile], limit: int, options: ReadOptions) -> Iterator[Any]:
    """The same, of sources."""
    every = max(1, -(-sum(source.bytes for source in sources) // limit))
    chosen = sources[::every] if len(sources) >= 2 * every else sources
    left = limit
    for source in chosen:
        for document in read_slice(source, None, options, Report()):
            if left <= 0:
                return
            left -= len(document)
            yield document


def no_document(where: str, skipped: Counter[str]) -> UserError:
    """The refusal of an input without a document."""
    return UserError(f"--input: no document in {where}{reasons_of(skipped)}")


def reasons_of(skipped: Counter[str]) -> str:
    """Counts of what was left out, in brackets; empty if nothing was."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f" (left out: {reasons})" if reasons else ""


# -- one source ------------------------------------------------------------------------------------


def measure(source: InputFile, options: ReadOptions, report: Report) -> Extent | None:
    """How a source can be cut, None for a file that is left out and counted. Raises UserError like
    `read_slice`.
    """
    if source.format in (JSONL, ARRAY, TEXT):
        if source.is_compressed:
            return Extent(1, _RATIO * source.bytes)
        return Extent(source.bytes if source.format == JSONL else 1, source.bytes)
    from data_tools.readers import tables

    try:
        return tables.measure(source, options)
    except OSError as error:
        _problem(source, report, "files unreadable", f"cannot be read ({error})")
        return None


def read_slice(
    source: InputFile,
    part: Slice | None,
    options: ReadOptions,
    report: Report,
    record: Record | None = None,
) -> Iterator[Any]:
    """The documents of a source that lie in `part` (None: all), none of them empty: texts, or what
    `record` makes.

    Raises:
        UserError: a named file that cannot be read or is not UTF-8; a bad line or a file that
            breaks off, without `skip_bad`.
    """
    entry: dict[str, Any] = {"path": source.path, "bytes": source.bytes, "documents": 0}
    try:
        for document in _documents(source, part, options, report, record):
            if not document:
                report.skipped["documents empty"] += 1
            elif options.structured or _length_fits(document, source, options, report):
                entry["documents"] += 1
                yield document
    except UnicodeDecodeError as error:
        _problem(
            source,
            report,
            "files not UTF-8",
            f"byte {error.start} is not UTF-8; text, code and JSON Lines are read",
        )
    except (OSError, EOFError, zlib.error, BrokenArray) as error:
        # A table was read when it was measured, and may be one slice of many: what fails now is
        # never left out silently.
        if not entry["documents"] and source.format in (TEXT, JSONL, ARRAY):
            _problem(source, report, "files unreadable", f"cannot be read ({error})")
        elif options.skip_bad:
            report.leave_out(
                source.path,
                None,
                "files that break off",
                f"after {entry['documents']:,} documents ({error})",
            )
        else:
            raise UserError(
                f"{source.path}: breaks off after {entry['documents']:,} documents ({error});"
                " --skip-bad keeps those"
            ) from None
    if entry["documents"]:
        report.sources.append(entry)


def _documents(
    source: InputFile,
    part: Slice | None,
    options: ReadOptions,
    report: Report,
    record: Record | None,
) -> Iterator[Any]:
    if source.format == TEXT:
        return _whole(source, options, report)
    if source.format in (JSONL, ARRAY):
        import orjson

        def parse(raw: bytes) -> Any:
            return _json(raw, orjson.loads, source.format)

        if source.format == ARRAY:
            return _accepted(
                _elements(source, options, report),
                source,
                options,
                report,
                record,
                parse,
                lambda: 0,
            )
        rows = _lines(source, part or Slice(0, source.bytes), options, report)
        before = functools.cache(lambda: _count_lines(source, part.start if part else 0))
        return _accepted(rows, source, options, report, record, parse, before)
    from data_tools.readers import tables

    first, values = tables.rows(source, part, options)
    return _accepted(values, source, options, report, record, _row, lambda: first)


def _accepted(
    rows: Iterable[tuple[int, Any]],
    source: InputFile,
    options: ReadOptions,
    report: Report,
    record: Record | None,
    parse: Callable[[Any], Any],
    lines_before: Callable[[], int],
) -> Iterator[Any]:
    """The document of every (number in the slice, line or row); bad ones stop the reading or are
    counted.
    """
    for number, raw in rows:
        try:
            if record is None:
                yield string_field(parse(raw), options.text_field, "choose it with --text-field")
            else:
                yield record(parse(raw), (source.path, lines_before() + number))
        except BadRecord as problem:
            line = lines_before() + number
            if not options.skip_bad:
                place, what = (
                    (", element ", "elements") if source.format == ARRAY else (":", "lines")
                )
                raise UserError(
                    f"{source.path}{place}{line}: {problem}; --skip-bad counts such {what} and"
                    " leaves them out"
                ) from None
            report.leave_out(source.path, line, problem.reason, str(problem))


def _length_fits(text: str, source: InputFile, options: ReadOptions, report: Report) -> bool:
    if options.min_length <= len(text) <= options.max_length // 4:  # whatever its characters are
        return True
    size = len(text.encode("utf-8", "surrogatepass"))
    if size < options.min_length:
        report.skipped["documents shorter than --min-length"] += 1
    elif size > options.max_length:
        report.leave_out(
            source.path,
            None,
            "documents longer than --max-length",
            f"{size:,} bytes, it starts {text[:40]!r}",
        )
    return options.min_length <= size <= options.max_length


def _problem(source: InputFile, report: Report, reason: str, message: str) -> None:
    if source.named:
        raise UserError(f"--input: {source.path}: {message}") from None
    report.leave_out(source.path, None, reason, message)


def _whole(source: InputFile, options: ReadOptions, report: Report) -> Iterator[str]:
    with open_file(source.path) as stream:
        data = stream.read(options.max_length + len(codecs.BOM_UTF8) + 1)
    data = data.removeprefix(codecs.BOM_UTF8)
    if len(data) > options.max_length:
        report.leave_out(
            source.path, None, "documents longer than --max-length", "a file is one document"
        )
    else:
        yield data.decode("utf-8")


def _lines(
    source: InputFile, part: Slice, options: ReadOptions, report: Report
) -> Iterator[tuple[int, bytes]]:
    """Lines that start in a range of bytes, with their number counted from the first of them; blank
    ones are passed over.
    """
    with open_file(source.path) as stream:
        position, number = part.start, 0
        stop = None if source.is_compressed else part.stop
        if part.start:
            stream.seek(part.start - 1)
            # the line that holds the byte before belongs to another slice
            position += _pass_line(stream) - 1
        while stop is None or position < stop:
            line = stream.readline(options.max_line)
            if not line:
                return
            number += 1
            size = len(line)
            if size == options.max_line and not line.endswith(b"\n"):
                size += _pass_line(stream)
                message = f"{size:,} bytes at byte {position:,}, read are {options.max_line:,}"
                report.leave_out(source.path, None, "lines too long to read", message)
                line = b""
            elif not position:
                line = line.removeprefix(codecs.BOM_UTF8)
            position += size
            if line.strip():
                yield number, line


def _elements(
    source: InputFile, options: ReadOptions, report: Report
) -> Iterator[tuple[int, bytes]]:
    """The elements of an array with their numbers, from 1."""
    with open_file(source.path) as stream:
        for number, (start, content) in enumerate(elements(stream, options.max_line), start=1):
            if content is None:
                message = f"more than {options.max_line:,} bytes, from byte {start:,} on"
                report.leave_out(source.path, number, "elements too long to read", message)
            else:
                yield number, content


def _pass_line(stream: BinaryIO) -> int:
    """Go to the start of the next line; how many bytes that was."""
    size = 0
    while piece := stream.readline(1 << 20):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def _count_lines(source: InputFile, start: int) -> int:
    """Lines before the first one of a slice that starts at this byte: lines are numbered as in the
    file.
    """
    if not start:
        return 0
    count, left, piece = 0, start, b""
    with open_file(source.path) as stream:
        while left and (piece := stream.read(min(left, 1 << 20))):
            count += piece.count(b"\n")
            left -= len(piece)
    # a line that goes on past the start of the slice is passed over there
    return count + (not piece.endswith(b"\n"))


def _row(value: Any) -> Any:
    if isinstance(value, UnicodeDecodeError):
        raise BadRecord("rows not UTF-8", f"not UTF-8 ({value.reason})")
    return value


def _json(raw: bytes, parse: Callable[[bytes], Any], format: str) -> Any:
    try:
        return parse(raw)
    except ValueError as error:
        if format == ARRAY:
            raise BadRecord("elements not JSON", f"not JSON ({error})") from None
        raise BadRecord(
            "lines not JSON", f"not JSON ({error}); every line must be one JSON object; {_ARRAYS}"
        ) from None


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
        raise BadRecord(
            "lines without the field",
            f"a JSON {type(value).__name__}, not an object with the field '{name}'; {remedy}",
        )
    if name not in value:
        names = ", ".join(list(value)[:_NAMES_SHOWN]) + (
            ", ..." if len(value) > _NAMES_SHOWN else ""
        )
        raise BadRecord(
            "lines without the field",
            f"field '{name}' is missing, there are: {names}{did_you_mean(name, value)}; {remedy}",
        )
    text = value[name]
    if not isinstance(text, str):
        raise BadRecord(
            "lines whose field is not a string",
            f"field '{name}' is not a string but {type(text).__name__}; {remedy}",
        )
    return text
