"""Read documents from sources of any format.

A source is read in slices, so that several processes can share a large one. There is one function
for each type of document: `read_texts` yields strings, `read_records` yields what a function makes
of each record.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_tools.readers.hf_datasets import measure_dataset, read_dataset
from data_tools.readers.input_file import (
    ARRAY,
    DATASET,
    JSONL,
    TEXT,
    Extent,
    InputFile,
    Slice,
)
from data_tools.readers.json_arrays import BrokenArray, read_json_array
from data_tools.readers.json_lines import read_json_lines
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import BadRecord, Origin, Record, RecordStream, string_field
from data_tools.readers.report import Report, no_document
from data_tools.readers.sources import find_sources
from data_tools.readers.tables import measure_table, read_table
from data_tools.readers.text_files import read_text_file
from llada.arithmetic import ceil_div
from llada.errors import UserError

D = TypeVar("D")

_COMPRESSION_RATIO = 4
"""Bytes of text assumed for a byte of a compressed file, when work is shared out."""


# -- whole inputs ----------------------------------------------------------------------------------


def read_inputs(
    inputs: Sequence[str | Path], options: ReadOptions, report: Report
) -> Iterator[str]:
    """Yield the texts of all inputs, none of them empty.

    Args:
        inputs: see `find_sources`, which also defines the order.
        options: how to read.
        report: filled while reading.

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

    Of many files every n-th is read, of few the first ones.
    """
    sources = find_sources(inputs, options, Report())
    total_bytes = sum(source.bytes for source in sources)
    # With n times as much data as is wanted, every n-th file holds about enough: of 100 files of
    # 100 bytes, 1,000 characters are those of every 10th. With fewer than two files to choose
    # from, the first files are read instead.
    stride = max(1, ceil_div(total_bytes, max_characters))
    if len(sources) >= 2 * stride:
        sources = sources[::stride]
    return _first_texts(sources, max_characters, options)


def _first_texts(
    sources: Sequence[InputFile], max_characters: int, options: ReadOptions
) -> Iterator[str]:
    left = max_characters
    for source in sources:
        for text in read_texts(source, None, options, Report()):
            if left <= 0:
                return
            left -= len(text)
            yield text


# -- one source ------------------------------------------------------------------------------------


def measure(source: InputFile, options: ReadOptions, report: Report) -> Extent | None:
    """Return how a source can be cut; None for an unreadable file, which is left out and counted.

    Raises:
        UserError: a named file that cannot be read, a table without the column to read.
    """
    if source.format in (JSONL, ARRAY, TEXT):
        if source.is_compressed:
            return Extent(1, _COMPRESSION_RATIO * source.bytes)
        if source.format == JSONL:
            return Extent(source.bytes, source.bytes)
        return Extent(1, source.bytes)
    try:
        if source.format == DATASET:
            return measure_dataset(source, options)
        return measure_table(source, options)
    except OSError as error:
        _leave_out_file(source, report, "files unreadable", f"cannot be read ({error})")
        return None


def read_texts(
    source: InputFile, part: Slice | None, options: ReadOptions, report: Report
) -> Iterator[str]:
    """Yield the texts of a slice of a source, none of them empty.

    Args:
        source: from `find_sources`.
        part: positions to read; None: all.
        options: how to read; `text_field` must not be None.
        report: filled while reading.

    Raises:
        UserError: a named file that cannot be read or is not UTF-8; a bad line or a file that
            breaks off, without `skip_bad`.
    """
    with _reading(source, options, report) as progress:
        for text in _texts(source, part, options, report):
            if not text:
                report.skipped["documents empty"] += 1
            elif _length_fits(text, source, options, report):
                progress.num_documents += 1
                yield text


def read_records(
    source: InputFile,
    part: Slice | None,
    options: ReadOptions,
    report: Report,
    convert: Callable[[object, Origin], D],
) -> Iterator[D]:
    """Yield what `convert` makes of each record of a slice of a source.

    Args:
        source: from `find_sources`.
        part: positions to read; None: all.
        options: how to read; `text_field` must be None.
        report: filled while reading.
        convert: makes a document of a JSON value and its origin, or raises BadRecord.

    Raises:
        UserError: see `read_texts`.
    """
    with _reading(source, options, report) as progress:
        stream = _record_stream(source, part, options, report)

        def document_of(record: Record) -> D:
            line = stream.num_before() + record.number
            return convert(record.value, Origin(source.path, line))

        for document in _converted(stream, document_of, source, options, report):
            progress.num_documents += 1
            yield document


def _texts(
    source: InputFile, part: Slice | None, options: ReadOptions, report: Report
) -> Iterator[str]:
    """Yield the texts of a source whatever their lengths; lazily, so nothing is opened before."""
    if source.format == TEXT:
        yield from read_text_file(source, options, report)
        return
    text_field = options.text_field
    assert text_field is not None

    def text_of(record: Record) -> str:
        return string_field(record.value, text_field, "choose it with --text-field")

    stream = _record_stream(source, part, options, report)
    yield from _converted(stream, text_of, source, options, report)


def _record_stream(
    source: InputFile, part: Slice | None, options: ReadOptions, report: Report
) -> RecordStream:
    if source.format == JSONL:
        return read_json_lines(source, part, options, report)
    if source.format == ARRAY:
        return read_json_array(source, options, report)
    if source.format == DATASET:
        return read_dataset(source, part, options)
    return read_table(source, part, options)


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
            report.leave_out(source.path, line, problem.reason, str(problem))
            continue
        yield document


def _bad_record(source: InputFile, line: int, problem: BadRecord) -> UserError:
    if source.format == ARRAY:
        where = f"{source.path}, element {line}"
        unit = "elements"
    else:
        where = f"{source.path}:{line}"
        unit = "lines"
    return UserError(f"{where}: {problem}; --skip-bad counts such {unit} and leaves them out")


def _length_fits(text: str, source: InputFile, options: ReadOptions, report: Report) -> bool:
    """Return whether a text has an allowed length; count it if not."""
    # A character has 1 to 4 bytes in UTF-8, so most texts need not be encoded to see that they fit.
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
class _Progress:
    """How far the reading of a source is."""

    num_documents: int = 0


@contextmanager
def _reading(source: InputFile, options: ReadOptions, report: Report) -> Iterator[_Progress]:
    """Handle what goes wrong while a source is read, and add it to the report at the end.

    A file that cannot be read at all is left out, unless the command line names it. One that
    breaks off after some documents is an error unless `skip_bad` keeps these.
    """
    progress = _Progress()
    try:
        yield progress
    except UnicodeDecodeError as error:
        message = f"byte {error.start} is not UTF-8; text, code and JSON Lines are read"
        _leave_out_file(source, report, "files not UTF-8", message)
    except (OSError, EOFError, zlib.error, BrokenArray) as error:
        # A table was readable when it was measured, and this may be one slice of many: what fails
        # now is never left out silently.
        is_table = source.format not in (TEXT, JSONL, ARRAY)
        if progress.num_documents == 0 and not is_table:
            _leave_out_file(source, report, "files unreadable", f"cannot be read ({error})")
        elif options.skip_bad:
            message = f"after {progress.num_documents:,} documents ({error})"
            report.leave_out(source.path, None, "files that break off", message)
        else:
            raise UserError(
                f"{source.path}: breaks off after {progress.num_documents:,} documents ({error});"
                " --skip-bad keeps those"
            ) from None
    if progress.num_documents:
        report.sources.append(
            {"path": source.path, "bytes": source.bytes, "documents": progress.num_documents}
        )


def _leave_out_file(source: InputFile, report: Report, reason: str, message: str) -> None:
    """Count a file that cannot be read. Raises UserError if the command line names it."""
    if source.named:
        raise UserError(f"--input: {source.path}: {message}") from None
    report.leave_out(source.path, None, reason, message)
