"""Text and code files: each file is one record, whose only field is its text."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from data_tools.readers.compression import open_file
from data_tools.readers.input_file import InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import Record, RecordStream
from data_tools.readers.report import Report


def read_text_file(
    source: InputFile, slice_: Slice | None, options: ReadOptions, report: Report
) -> RecordStream:
    """Read a file, which cannot be cut. Its text is in the field `options.text_field`.

    Raises:
        UnicodeDecodeError: the file is not UTF-8, when its record is read.
        OSError, EOFError, zlib.error: the file cannot be read, when its record is.
    """
    return RecordStream(_records(source, options, report), lambda: 0)


def _records(source: InputFile, options: ReadOptions, report: Report) -> Iterator[Record]:
    """Yield the record of a file, without a byte order mark; none if the file is too long."""
    # One byte more than is allowed is enough to tell that a file is too long.
    with open_file(source.path) as stream:
        data = stream.read(options.max_length + len(codecs.BOM_UTF8) + 1)
    data = data.removeprefix(codecs.BOM_UTF8)
    if len(data) > options.max_length:
        report.leave_out(
            source.path, None, "documents longer than --max-length", "a file is one document"
        )
        return
    yield Record(1, {options.text_field: data.decode("utf-8")})
