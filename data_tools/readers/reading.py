"""Read documents from sources of any format.

A source is read in slices, so that several processes can share a large one. There is one function
per type of document: `read_texts` yields strings, and `read_records` yields what a function makes
of each record.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_tools.readers.formats import FORMATS, list_extensions
from data_tools.readers.input_file import Extent, InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import (
    BadRecord,
    BrokenFile,
    Origin,
    Record,
    RecordStream,
    string_field,
)
from data_tools.readers.report import Report, no_document
from data_tools.readers.sources import find_sources
from llada.arithmetic import ceil_div
from llada.errors import UserError

D = TypeVar("D")


# -- whole inputs ----------------------------------------------------------------------------------


def read_inputs(
    inputs: Sequence[str | Path], options: ReadOptions, report: Report
) -> Iterator[str]:
    """Yield the texts of all inputs, none of them empty.

    Args:
        inputs: inputs, as for `find_sources`, which also defines the order.
        options: how inputs are read.
        report: counts what is left out.

    Raises:
        UserError: a named file that is missing, unreadable, not UTF-8 or without a document; a bad
            line; no document at all.
    """
    any_text = False
    for source in find_sources(inputs, options, report):
        skipped_before = report.skipped.copy()
        any_text_of_source = False
        for text in read_texts(source, None, options, report):
            any_text = True
            any_text_of_source = True
            yield text
        if source.named and not any_text_of_source:
            raise no_document(source.path, report.skipped - skipped_before)
    if not any_text:
        raise no_document(", ".join(map(str, inputs)), report.skipped)


def sample_texts(
    inputs: Sequence[str | Path], max_characters: int, options: ReadOptions
) -> Iterator[str]:
    """Yield texts of the inputs until they have about `max_characters` characters.

    If there are many files, every n-th is read, else the first ones.
    """
    sources = find_sources(inputs, options, Report())
    total_bytes = sum(source.bytes for source in sources)
    # With n times as much data as wanted, every n-th file is about enough: of 100 files of 100
    # bytes, every 10th gives 1,000 characters. If that would be a single file, the first files are
    # read instead.
    stride = max(1, ceil_div(total_bytes, max_characters))
    if len(sources) >= 2 * stride:
        sources = sources[::stride]
    return _first_texts(sources, max_characters, options)


def _first_texts(
    sources: Sequence[InputFile], max_characters: int, options: ReadOptions
) -> Iterator[str]:
    remaining = max_characters
    for source in sources:
        for text in read_texts(source, None, options, Report()):
            if remaining <= 0:
                return
            remaining -= len(text)
            yield text


# -- one source ------------------------------------------------------------------------------------


def measure(source: InputFile, options: ReadOptions, report: Report) -> Extent | None:
    """Return how a source can be cut; None for an unreadable file, which is left out and counted.

    Raises:
        UserError: a named file that cannot be read, a table without the column to read.
    """
    try:
        return FORMATS[source.format].measure(source, options)
    except OSError as error:
        _leave_out_file(source, report, "files unreadable", f"cannot be read ({error})")
        return None


def read_texts(
    source: InputFile, slice_: Slice | None, options: ReadOptions, report: Report
) -> Iterator[str]:
    """Yield the texts of a slice of a source, none of them empty.

    Args:
        source: source to read, from `find_sources`.
        slice_: positions to read; None for all.
        options: how inputs are read; `text_field` must not be None.
        report: counts what is left out.

    Raises:
        UserError: a named file that cannot be read or is not UTF-8; a bad line or a truncated file,
            without `skip_bad`.
    """
    text_field = options.text_field
    assert text_field is not None

    def text_of(record: Record) -> str:
        return string_field(record.value, text_field, "choose it with --text-field")

    with _reading(source, options, report) as given:
        stream = FORMATS[source.format].read(source, slice_, options, report)
        for text in _converted(stream, text_of, source, options, report):
            if not text:
                report.skipped["documents empty"] += 1
            elif _length_fits(text, source, options, report):
                given.num_documents += 1
                yield text


def read_records(
    source: InputFile,
    slice_: Slice | None,
    options: ReadOptions,
    report: Report,
    convert: Callable[[object, Origin], D],
) -> Iterator[D]:
    """Yield what `convert` makes of each record of a slice of a source.

    Args:
        source: source to read, from `find_sources`.
        slice_: positions to read; None for all.
        options: how inputs are read; `text_field` must be None.
        report: counts what is left out.
        convert: makes a document of a JSON value and its origin, or raises BadRecord.

    Raises:
        UserError: see `read_texts`.
    """
    with _reading(source, options, report) as given:
        stream = FORMATS[source.format].read(source, slice_, options, report)

        def document_of(record: Record) -> D:
            line = stream.num_before() + record.number
            return convert(record.value, Origin(source.path, line))

        for document in _converted(stream, document_of, source, options, report):
            given.num_documents += 1
            yield document


def _converted(
    stream: RecordStream,
    document_of: Callable[[Record], D],
    source: InputFile,
    options: ReadOptions,
    report: Report,
) -> Iterator[D]:
    """Yield the document of every record; a bad record stops the reading or is counted."""
    for record in stream.records:
        try:
            if record.problem is not None:
                raise record.problem
            document = document_of(record)
        except BadRecord as problem:
            line = stream.num_before() + record.number
            if not options.skip_bad:
                raise _bad_record(source, line, problem) from None
            reason = problem.reason(FORMATS[source.format].records)
            report.leave_out(source.path, line, reason, str(problem))
            continue
        yield document


def _bad_record(source: InputFile, line: int, problem: BadRecord) -> UserError:
    format = FORMATS[source.format]
    where = source.path + format.position.format(number=line)
    return UserError(
        f"{where}: {problem}; --skip-bad counts such {format.records} and leaves them out"
    )


def _length_fits(text: str, source: InputFile, options: ReadOptions, report: Report) -> bool:
    """Return whether the length of a text is allowed; count the text if not."""
    # A character has 1 to 4 bytes in UTF-8, so most texts fit for certain without being encoded.
    if options.min_length <= len(text) <= options.max_length // 4:
        return True
    size = len(text.encode("utf-8", "surrogatepass"))
    if size < options.min_length:
        report.skipped["documents shorter than --min-length"] += 1
        return False
    if size > options.max_length:
        message = f"{size:,} bytes, it starts {text[:40]!r}"
        report.leave_out(source.path, None, "documents longer than --max-length", message)
        return False
    return True


# -- files that cannot be read ---------------------------------------------------------------------


@dataclass
class _DocumentCount:
    """Number of documents that a source has given so far."""

    num_documents: int = 0


@contextmanager
def _reading(source: InputFile, options: ReadOptions, report: Report) -> Iterator[_DocumentCount]:
    """Handle the errors of a file that cannot be read while the block reads it.

    A file that cannot be read at all is left out, unless the command line names it. A file that
    breaks off after some documents is an error, unless `skip_bad` keeps these.
    """
    given = _DocumentCount()
    try:
        yield given
    except (UnicodeDecodeError, OSError, EOFError, zlib.error, BrokenFile) as error:
        if isinstance(error, UnicodeDecodeError) and given.num_documents == 0:
            message = (
                f"byte {error.start} is not UTF-8; a file that is not text needs the extension of"
                f" its format: {list_extensions()}"
            )
            _leave_out_file(source, report, "files not UTF-8", message)
            return
        # A file that could be opened when it was measured has changed since, and this may be one
        # slice of many: it is never left out silently.
        was_readable = FORMATS[source.format].is_opened_to_measure
        if given.num_documents == 0 and not was_readable:
            _leave_out_file(source, report, "files unreadable", f"cannot be read ({error})")
        elif options.skip_bad:
            message = f"after {given.num_documents:,} documents ({error})"
            report.leave_out(source.path, None, "files that break off", message)
        else:
            raise UserError(
                f"{source.path}: breaks off after {given.num_documents:,} documents ({error});"
                " --skip-bad keeps those"
            ) from None


def _leave_out_file(source: InputFile, report: Report, reason: str, message: str) -> None:
    """Count a file that cannot be read. Raises UserError if the command line names it."""
    if source.named:
        raise UserError(f"--input: {source.path}: {message}") from None
    report.leave_out(source.path, None, reason, message)
