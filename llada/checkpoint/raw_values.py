"""Where the values of a stored tensor lie in its file, and reading and writing raw values."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from typing import IO, TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LOCAL_HEADER_BYTES = 30
"""Fixed part of a zip entry's local header, before the entry's name (PKWARE APPNOTE, 4.3.7)."""
_LENGTHS_OFFSET = 26
"""Where in that header the lengths of the name and of the extra field stand, 2 bytes each."""


class _FilePart(io.RawIOBase):
    """A part of a file, presented as a file of its own.

    Args:
        file: unbuffered.
        first: offset of the part, bytes.
        length: length of the part, bytes.
    """

    def __init__(self, file: io.FileIO, first: int, length: int) -> None:
        self._file = file
        self._first = first
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}
        self._position = origins[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        size = max(0, min(len(view), self._length - self._position))
        self._file.seek(self._first + self._position)
        count = self._file.readinto(view[:size]) or 0
        self._position += count
        return count


def find_values(
    file: io.FileIO, first: int, length: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> int:
    """Return where the values of a tensor that `torch.save` wrote begin in a file, in bytes.

    `torch.save` writes a zip archive whose entry `.../data/0` contains the values. Where they are
    uncompressed, contiguous and little-endian, the file can be read like the tensor's memory.

    Args:
        file: unbuffered.
        first: offset of the archive in the file, bytes.
        length: length of the archive, bytes.
        sizes, dtype: what the tensor must be.

    Raises:
        ValueError: another tensor, or one whose values are stored in another way.
    """
    # On the meta device torch reads the shape and no values.
    part = cast(IO[bytes], _FilePart(file, first, length))
    like = torch.load(part, map_location="meta", weights_only=True)
    plain = like.is_contiguous() and like.storage_offset() == 0
    if tuple(like.shape) != sizes or like.dtype != dtype or not plain:
        raise ValueError(
            f"it holds {like.dtype} {list(like.shape)}, the metadata says {dtype} {list(sizes)}"
        )
    with zipfile.ZipFile(cast(IO[bytes], _FilePart(file, first, length))) as archive:
        (entry,) = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        byte_order = archive.read(entry.filename.replace("/data/0", "/byteorder"))
    if (
        entry.compress_type != zipfile.ZIP_STORED
        or entry.file_size != like.nbytes
        or byte_order != b"little"
    ):
        raise ValueError("its values are not stored as they are")
    header = first + entry.header_offset
    file.seek(header + _LENGTHS_OFFSET)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return header + _LOCAL_HEADER_BYTES + name_length + extra_length


def read_into(file: io.FileIO, values: torch.Tensor) -> None:
    """Fill a contiguous tensor from an unbuffered file, starting at the file's position.

    Raises:
        ValueError: the file ends before the tensor is full.
    """
    rest = values.view(-1).view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError("it ends too early")
        rest = rest[count:]


def write_from(file: io.FileIO, values: torch.Tensor) -> None:
    """Write a contiguous tensor to an unbuffered file, at the file's position."""
    rest = values.view(-1).view(torch.uint8).numpy().data
    while rest:
        rest = rest[file.write(rest) :]
