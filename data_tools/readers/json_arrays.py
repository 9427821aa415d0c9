"""JSON arrays, read element by element: memory holds one element and a chunk of the file, however
large the array is.

The scanner finds where elements end; what an element holds is parsed, and checked, by whoever gets
its bytes.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from data_tools.readers.compression import open_file

_CHUNK = 1 << 18
_SPACE = b" \t\r\n"
_BETWEEN, _INSIDE = re.compile(rb'[",\[\]{}]'), re.compile(rb'["\[\]{}]')
"""What says where an element ends: outside of all its brackets, and inside of some."""
_TEXT = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
"""The rest of a string, as far as the chunk goes; it stops before a backslash that ends the chunk.
"""


class BrokenArray(Exception):
    """The file is no whole JSON array; the text says where it goes wrong."""


class Element(NamedTuple):
    """One element of an array.

    Attributes:
        start: where it begins, in bytes from the start of the (unpacked) file.
        content: its bytes, white space around them included; None if there are more than the reader
            takes.
    """

    start: int
    content: bytes | None


def holds_array(path: str) -> bool:
    """Whether the first character of a file, plain or compressed, that is no white space is `[`.
    False if it cannot be read.
    """
    try:
        with open_file(path) as stream:
            start = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
            while not start.strip(_SPACE):
                start = stream.read(1 << 10)
                if not start:
                    return False
    except (OSError, EOFError, zlib.error):  # whoever reads the documents says so
        return False
    return start.lstrip(_SPACE).startswith(b"[")


def elements(stream: BinaryIO, longest: int, chunk: int = _CHUNK) -> Iterator[Element]:
    """The elements of the array that a stream holds.

    Args:
        stream: from its start.
        longest: bytes of the longest element that is read.
        chunk: bytes read at a time.

    Raises:
        BrokenArray: the file ends before the array does, goes on after it, or lacks an element.
    """
    scanner = _Scanner(stream, longest, chunk)
    scanner.open()
    number, closed = 0, False
    while not closed:
        number += 1
        element, closed = scanner.element(number)
        if element.content is None or element.content.strip(_SPACE):
            yield element
        elif number > 1 or not closed:  # an array without elements is whole
            raise BrokenArray(f"element {number} is missing before byte {scanner.position - 1:,}")
    scanner.end()


class _Scanner:
    """A stream of bytes, some at a time."""

    def __init__(self, stream: BinaryIO, longest: int, chunk: int) -> None:
        self._stream, self._longest, self._size = stream, longest, chunk
        self._chunk, self._next, self._before = (
            b"",
            0,
            0,
        )  # what is read, up to where it is used, and the bytes before it

    @property
    def position(self) -> int:
        """Bytes used so far."""
        return self._before + self._next

    def _more(self) -> bool:
        """Read on, keeping what is not used; False at the end of the stream."""
        piece = self._stream.read(self._size)
        self._before += self._next
        self._chunk, self._next = self._chunk[self._next :] + piece, 0
        return bool(piece)

    def open(self) -> None:
        """Go behind the bracket that opens the array."""
        while len(self._chunk) < len(codecs.BOM_UTF8) and self._more():
            pass
        if self._chunk.startswith(codecs.BOM_UTF8):
            self._next = len(codecs.BOM_UTF8)
        if self._character() != b"[":
            raise BrokenArray("the file does not begin with [")

    def end(self) -> None:
        """Raises BrokenArray if anything but white space follows."""
        if self._character():
            raise BrokenArray(f"the array ends before byte {self.position - 1:,}, the file goes on")

    def _character(self) -> bytes:
        """The next character that is no white space; none at the end of the stream."""
        while True:
            rest = self._chunk[self._next :].lstrip(_SPACE)
            self._next = len(self._chunk) - len(rest)
            if rest:
                self._next += 1
                return rest[:1]
            if not self._more():
                return b""

    def element(self, number: int) -> tuple[Element, bool]:
        """The bytes up to the comma or bracket that ends an element, and whether that is the
        array's end.
        """
        start, begin = self.position, self._next
        parts: list[bytes] = []
        depth, size, in_string = 0, 0, False
        while True:
            mark = self._go_to_mark(in_string, depth)
            if not mark:
                used = self._chunk[begin : self._next]
                size += len(used)
                parts = [] if size > self._longest else parts
                parts.append(used)
                if not self._more():
                    raise BrokenArray(
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
            raise BrokenArray(
                f"element {number}, which begins at byte {start:,}, ends with a brace that nothing"
                " opens"
            )
        parts.append(self._chunk[begin : self._next - 1])
        whole = size + len(parts[-1]) <= self._longest
        return Element(start, b"".join(parts) if whole else None), mark == b"]"

    def _go_to_mark(self, in_string: bool, depth: int) -> bytes:
        """Go to the next character that says where the element ends; none if the chunk
        ends before.
        """
        if in_string:
            text = _TEXT.match(self._chunk, self._next)
            assert text is not None  # it matches the empty string too
            self._next = text.end()
            mark = self._chunk[self._next : self._next + 1]
            return mark if mark == b'"' else b""
        found = (_INSIDE if depth else _BETWEEN).search(self._chunk, self._next)
        self._next = found.start() if found else len(self._chunk)
        return found[0] if found else b""
