"""JSON Lines: one record per line, cut by ranges of bytes."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator
from typing import BinaryIO

from data_tools.readers.compression import open_file
from data_tools.readers.input_file import Extent, InputFile, Slice, measure_whole_file
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import BadRecord, Record, RecordStream
from data_tools.readers.report import Report

_CHUNK = 1 << 20
"""Bytes read at a time where lines are only skipped or counted."""


def measure_json_lines(source: InputFile, options: ReadOptions) -> Extent:
    """Return how a file can be cut: at any byte, unless it is compressed."""
    if source.is_compressed:
        return measure_whole_file(source, options)
    return Extent(source.bytes, source.bytes)


def read_json_lines(
    source: InputFile, slice_: Slice | None, options: ReadOptions, report: Report
) -> RecordStream:
    """Read the lines that start in a range of bytes (None: all lines), without blank ones.

    A line belongs to the slice in which it starts, so slices that tile the file yield every line
    exactly once, wherever the cuts are. A compressed file is always read whole.
    """
    slice_ = slice_ or Slice(0, source.bytes)
    num_before = functools.cache(functools.partial(_count_lines, source, slice_.start))
    return RecordStream(_records(source, slice_, options, report), num_before)


def _records(
    source: InputFile, slice_: Slice, options: ReadOptions, report: Report
) -> Iterator[Record]:
    import orjson

    for number, line in _lines(source, slice_, options, report):
        try:
            yield Record(number, orjson.loads(line))
        except ValueError as error:
            message = (
                f"not JSON ({error}); every line must be one JSON object; a file that is one JSON"
                " array has to end with .json"
            )
            yield Record(number, None, BadRecord("{records} not JSON", message))


def _lines(
    source: InputFile, slice_: Slice, options: ReadOptions, report: Report
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a slice that are not blank, numbered from the slice's first line."""
    with open_file(source.path) as stream:
        position = slice_.start
        number = 0
        stop: int | None = slice_.stop
        if source.is_compressed:
            # A slice counts bytes of the compressed file, the stream those of the decompressed one.
            stop = None
        if slice_.start:
            # The line that contains the byte before the slice belongs to the slice before, so it is
            # skipped. If bytes 0..4 are b'{"a"\n', a slice from 3 skips bytes 2, 3 and 4. A slice
            # from 5, where a line starts, skips byte 4 alone, the newline.
            stream.seek(slice_.start - 1)
            position += _skip_line(stream) - 1
        while stop is None or position < stop:
            line = stream.readline(options.max_line)
            if not line:
                return
            number += 1
            size = len(line)
            if size == options.max_line and not line.endswith(b"\n"):
                size += _skip_line(stream)
                message = (
                    f"line of {size:,} bytes at byte {position:,}; the limit is"
                    f" {options.max_line:,}"
                )
                report.leave_out(source.path, None, "lines too long to read", message)
                line = b""
            elif position == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            position += size
            if line.strip():
                yield number, line


def _skip_line(stream: BinaryIO) -> int:
    """Move to the start of the next line; return the number of bytes skipped."""
    size = 0
    while chunk := stream.readline(_CHUNK):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def _count_lines(source: InputFile, start: int) -> int:
    """Count the lines of a file before the first one that starts at byte `start` or later."""
    if not start:
        return 0
    count = 0
    remaining = start
    chunk = b""
    with open_file(source.path) as stream:
        while remaining and (chunk := stream.read(min(remaining, _CHUNK))):
            count += chunk.count(b"\n")
            remaining -= len(chunk)
    # A line that goes on past `start` has no newline yet, and the slice skips it.
    if not chunk.endswith(b"\n"):
        count += 1
    return count
