"""JSON arrays, read element by element: memory holds one element and one chunk of the file.

A scanner finds where each element ends, and its bytes are then parsed by themselves.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from data_tools.readers.compression import open_file
from data_tools.readers.input_file import InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import BadRecord, BrokenFile, Record, RecordStream
from data_tools.readers.report import Report

_CHUNK = 1 << 18
_WHITE_SPACE = b" \t\r\n"

# The characters that the scanner looks for. A comma ends an element, but not inside its brackets.
_MARK_OUTSIDE = re.compile(rb'[",\[\]{}]')
_MARK_INSIDE = re.compile(rb'["\[\]{}]')
# The rest of a string, up to its closing quote or to the end of the chunk. It stops before a
# backslash that ends the chunk, because the next byte belongs to it.
_STRING_REST = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


class Element(NamedTuple):
    """One element of an array.

    Attributes:
        start: position in the (decompressed) file at which it begins, in bytes.
        content: its bytes, with the white space around them; None if it is too long to read.
    """

    start: int
    content: bytes | None


def holds_array(path: str) -> bool:
    """Return whether the first character of a file is `[`, after white space.

    The file may be compressed. False if it cannot be read; reading its documents then reports why.
    """
    try:
        with open_file(path) as stream:
            start = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
            while not start.strip(_WHITE_SPACE):
                start = stream.read(1 << 10)
                if not start:
                    return False
    except (OSError, EOFError, zlib.error):
        return False
    return start.lstrip(_WHITE_SPACE).startswith(b"[")


def read_json_array(
    source: InputFile, slice_: Slice | None, options: ReadOptions, report: Report
) -> RecordStream:
    """Read all elements of an array, which cannot be cut."""
    return RecordStream(_records(source, options, report), lambda: 0)


def _records(source: InputFile, options: ReadOptions, report: Report) -> Iterator[Record]:
    import orjson

    with open_file(source.path) as stream:
        for number, (start, content) in enumerate(elements(stream, options.max_line), start=1):
            if content is None:
                message = f"more than {options.max_line:,} bytes, from byte {start:,} on"
                report.leave_out(source.path, number, "elements too long to read", message)
                continue
            try:
                yield Record(number, orjson.loads(content))
            except ValueError as error:
                problem = BadRecord("{records} not JSON", f"not JSON ({error})")
                yield Record(number, None, problem)


# -- the scanner -----------------------------------------------------------------------------------


def elements(stream: BinaryIO, longest: int, chunk: int = _CHUNK) -> Iterator[Element]:
    """Yield the elements of the array that a stream contains.

    Args:
        stream: stream to read, at its start.
        longest: bytes of the longest element whose content is kept.
        chunk: bytes read at a time.

    Raises:
        BrokenFile: the file ends before the array does, continues after it, or lacks an element.
    """
    scanner = _Scanner(stream, longest, chunk)
    scanner.open()
    number = 0
    closed = False
    while not closed:
        number += 1
        element, closed = scanner.element(number)
        if element.content is None or element.content.strip(_WHITE_SPACE):
            yield element
        elif number > 1 or not closed:  # only `[]` has an element 1 without content
            raise BrokenFile(f"element {number} is missing before byte {scanner.position - 1:,}")
    scanner.end()


class _Scanner:
    """Walks through a stream of bytes, one chunk at a time, and finds where elements end."""

    def __init__(self, stream: BinaryIO, longest: int, chunk_size: int) -> None:
        self._stream = stream
        self._longest = longest
        self._chunk_size = chunk_size
        self._chunk = b""  # the bytes in memory
        self._next = 0  # index in the chunk of the first unused byte
        self._before = 0  # bytes of the stream before the chunk

    @property
    def position(self) -> int:
        """Number of bytes of the stream used so far."""
        return self._before + self._next

    def _read_on(self) -> bool:
        """Read the next chunk after the unused bytes; return False at the end of the stream."""
        data = self._stream.read(self._chunk_size)
        self._before += self._next
        self._chunk = self._chunk[self._next :] + data
        self._next = 0
        return bool(data)

    def open(self) -> None:
        """Move past the bracket that opens the array."""
        while len(self._chunk) < len(codecs.BOM_UTF8) and self._read_on():
            pass
        if self._chunk.startswith(codecs.BOM_UTF8):
            self._next = len(codecs.BOM_UTF8)
        if self._character() != b"[":
            raise BrokenFile("the file does not begin with [")

    def end(self) -> None:
        """Raise BrokenFile if anything but white space follows."""
        if self._character():
            raise BrokenFile(f"the array ends before byte {self.position - 1:,}, the file goes on")

    def _character(self) -> bytes:
        """Return the next character that is not white space; empty at the end of the stream."""
        while True:
            rest = self._chunk[self._next :].lstrip(_WHITE_SPACE)
            self._next = len(self._chunk) - len(rest)
            if rest:
                self._next += 1
                return rest[:1]
            if not self._read_on():
                return b""

    def element(self, number: int) -> tuple[Element, bool]:
        """Read up to the comma or bracket that ends an element.

        Returns:
            The element, and whether the array ends with it.
        """
        start = self.position
        begin = self._next  # index in the chunk of the element's first byte there
        pieces: list[bytes] = []  # the element's bytes in earlier chunks
        size = 0  # number of these
        depth = 0  # number of open brackets
        in_string = False
        while True:
            mark = self._go_to_mark(in_string, depth)
            if not mark:
                # The chunk ends inside the element. An element that is too long is not kept.
                used = self._chunk[begin : self._next]
                size += len(used)
                if size > self._longest:
                    pieces = []
                pieces.append(used)
                if not self._read_on():
                    raise BrokenFile(
                        f"element {number}, which begins at byte {start:,}, does not end"
                    )
                begin = self._next
                continue
            self._next += 1
            if mark == b'"':
                in_string = not in_string
            elif mark in b"[{":
                depth += 1
            elif depth:
                depth -= 1
            else:
                break
        if mark == b"}":
            raise BrokenFile(
                f"element {number}, which begins at byte {start:,}, ends with a brace that nothing"
                " opens"
            )
        last = self._chunk[begin : self._next - 1]
        content = None
        if size + len(last) <= self._longest:
            content = b"".join([*pieces, last])
        return Element(start, content), mark == b"]"

    def _go_to_mark(self, in_string: bool, depth: int) -> bytes:
        """Move to the next character that matters; empty if the chunk ends before one."""
        if in_string:
            rest = _STRING_REST.match(self._chunk, self._next)
            assert rest is not None  # it matches the empty string too
            self._next = rest.end()
            if self._chunk.startswith(b'"', self._next):
                return b'"'
            # The chunk ends here, or after a backslash.
            return b""
        marks = _MARK_INSIDE if depth else _MARK_OUTSIDE
        match = marks.search(self._chunk, self._next)
        if match is None:
            self._next = len(self._chunk)
            return b""
        self._next = match.start()
        return match[0]
