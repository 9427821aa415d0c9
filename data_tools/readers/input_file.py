"""One file or dataset of the input, and the slices it can be cut into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_tools.readers.options import ReadOptions

HUB = "hf:"
"""Prefix of an input that is a Hugging Face dataset."""
COMPRESSED = (".gz", ".zst")
"""Extensions of compressed files."""
_COMPRESSION_RATIO = 4
"""Bytes of text assumed per byte of a compressed file, when work is divided."""


@dataclass(frozen=True)
class InputFile:
    """One file, or one split of a dataset.

    Attributes:
        path: path as the command line or the walk through a folder gives it; of a dataset, its
            name with the prefix.
        format: name of its format, a key of `formats.FORMATS`.
        named: whether the command line names it. Then a problem with it is a user error;
            otherwise the file is left out and counted.
        bytes: size on disk; 0 for a dataset.
        stamp: value that changes with the content: modification time in ns, or a dataset's
            fingerprint.
    """

    path: str
    format: str
    named: bool
    bytes: int
    stamp: str

    @property
    def is_compressed(self) -> bool:
        return Path(self.path).suffix.lower() in COMPRESSED


class Slice(NamedTuple):
    """Positions start..stop-1 of a source.

    The unit of positions depends on the format: bytes of plain JSON Lines, row groups of Parquet,
    record batches of Arrow, rows of a dataset, or files of a streamed one. Text files, arrays and
    compressed files cannot be cut: their only position is 0.
    """

    start: int
    stop: int


class Extent(NamedTuple):
    """How a source can be cut.

    Attributes:
        length: number of its positions.
        text_bytes: estimated bytes of its text.
        sizes: estimated bytes of text at each position; None if all positions hold the same.
    """

    length: int
    text_bytes: int
    sizes: list[int] | None = None


def measure_whole_file(source: InputFile, options: ReadOptions) -> Extent:
    """Return the extent of a file that cannot be cut."""
    if source.is_compressed:
        return Extent(1, _COMPRESSION_RATIO * source.bytes)
    return Extent(1, source.bytes)


def extension(path: Path) -> str:
    """Return the lower-case extension, without that of a compression: a.TXT.gz -> .txt."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower()
