"""Text and code files: each file is one document."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from data_tools.readers.compression import open_file
from data_tools.readers.input_file import InputFile
from data_tools.readers.options import ReadOptions
from data_tools.readers.report import Report


def read_text_file(source: InputFile, options: ReadOptions, report: Report) -> Iterator[str]:
    """Yield the text of a file, without a byte order mark; nothing if it is too long.

    Raises:
        UnicodeDecodeError: not UTF-8.
        OSError, EOFError, zlib.error: the file cannot be read.
    """
    # One byte more than is allowed is enough to tell that a file is too long.
    with open_file(source.path) as stream:
        data = stream.read(options.max_length + len(codecs.BOM_UTF8) + 1)
    data = data.removeprefix(codecs.BOM_UTF8)
    if len(data) > options.max_length:
        report.leave_out(
            source.path, None, "documents longer than --max-length", "a file is one document"
        )
        return
    yield data.decode("utf-8")
