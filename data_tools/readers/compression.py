"""Open a file as a stream of bytes, decompressed if necessary."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

_READ_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 18
_LARGEST_ZSTD_WINDOW = 1 << 31
"""Allowed window size: zstandard's default is 128 MiB, and `zstd --long=31` writes larger ones."""


def open_file(path: str) -> BinaryIO:
    """Open a file for reading, decompressed if its name ends in .gz or .zst.

    The stream can only be read forward, since a .zst file cannot seek. A byte order mark is still
    there.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(Path(path)), _BUFFER_BYTES)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file of any number of frames.

    zstandard's own reader reads a truncated file as if it were complete; this one raises EOFError,
    as gzip does.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 (outlives this method; closed by close)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW)
        self._error: type[Exception] = zstandard.ZstdError
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""  # bytes read from the file and not decompressed yet
        self._ready = memoryview(b"")  # bytes decompressed and not returned yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with up to its length of decompressed bytes; 0 at the end of the file."""
        while not self._ready:
            self._compressed = self._compressed or self._file.read(_READ_BYTES)
            if not self._compressed:
                # The end of the file is the end of the stream only between frames.
                if self._frame is not None:
                    raise EOFError(
                        "Compressed file ended before the end-of-stream marker was reached"
                    )
                return 0
            self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> None:
        """Decompress the bytes read; those after the end of a frame stay for the next frame."""
        frame = self._frame or self._decompressor.decompressobj()
        try:
            self._ready = memoryview(frame.decompress(self._compressed))
        except self._error as error:
            raise OSError(str(error)) from None
        self._compressed = b""
        self._frame = frame
        if frame.eof:
            self._compressed = frame.unused_data
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()
