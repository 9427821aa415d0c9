"""One file or dataset of the input, its format, and the slices it can be cut into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TEXT = "text"
JSONL = "jsonl"
ARRAY = "json array"
PARQUET = "parquet"
ARROW = "arrow"
DATASET = "dataset"
"""The last of the formats: a dataset that the `datasets` library loads."""

HUB = "hf:"
"""Prefix of an input that is such a dataset."""
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class InputFile:
    """One file, or one split of a dataset.

    Attributes:
        path: as given on the command line or found in a folder; of a dataset, with its prefix.
        format: one of the formats above.
        named: whether the command line names it. Then a problem with it is the user's mistake;
            otherwise the file is left out and counted.
        bytes: size on disk; 0 for a dataset.
        stamp: changes when the content changes: modification time in ns, or a dataset's
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

    What a position is depends on the format: a byte of plain JSON Lines, a row group of Parquet, a
    record batch of Arrow, a row of a dataset or a file of a streamed one. Text files, arrays and
    compressed files cannot be cut: they have the one position 0.
    """

    start: int
    stop: int


class Extent(NamedTuple):
    """How a source can be cut.

    Attributes:
        length: number of its positions.
        text_bytes: estimated bytes of text it holds.
        sizes: estimated bytes of text at every position; None: equal for all.
    """

    length: int
    text_bytes: int
    sizes: list[int] | None = None


def extension(path: Path) -> str:
    """Return the lower-case extension below that of the compression: a.TXT.gz -> .txt."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower()
