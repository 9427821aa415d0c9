"""Files as streams of bytes, plain or compressed."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO


def open_file(path: str) -> BinaryIO:
    """The bytes of a file, unpacked if its name ends in .gz or .zst."""
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(Path(path)), 1 << 18)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file of any number of frames. Unlike zstandard's own reader it does not take a file
    that breaks off for a whole one.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 (outlives this method; closed by close)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error: type[Exception] = zstandard.ZstdError
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(1 << 16)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError(
                        "Compressed file ended before the end-of-stream marker was reached"
                    )
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise OSError(str(error)) from None
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()
