"""How inputs are read: the settings that `llada data prepare` and similar commands share."""

from __future__ import annotations

from dataclasses import dataclass

from llada.errors import UserError

_LARGEST_MAX_LENGTH = 1 << 40
_OTHER_FIELDS_BYTES = 1 << 20
"""Bytes that a line may have in addition to its text."""


@dataclass(frozen=True)
class ReadOptions:
    """How inputs are read.

    Attributes:
        text_field: field or column that contains the text. None if documents are whole records,
            such as conversations; then text files are not read, and `min_length` and `max_length`
            do not filter.
        extensions: extensions of the text files to read in folders; None for TEXT_EXTENSIONS. JSON
            Lines and tables are always read.
        skip_bad: whether to count bad lines and truncated files instead of stopping.
        min_length: UTF-8 bytes of the shortest text to keep; shorter ones are counted.
        max_length: UTF-8 bytes of the longest text to keep; longer ones are counted. Bounds
            memory too: a line longer than `max_line` is never in memory as a whole.
        split: split of `hf:` inputs, as for `datasets.load_dataset`.
        name: configuration of `hf:` inputs.
        revision: commit or tag of `hf:` inputs.
        streaming: whether to read `hf:` inputs without downloading them first.

    Raises:
        UserError: lengths that contradict each other or do not fit in memory.
    """

    text_field: str | None = "text"
    extensions: frozenset[str] | None = None
    skip_bad: bool = False
    min_length: int = 1
    max_length: int = 64 << 20
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.min_length < 1:
            raise UserError(f"--min-length: {self.min_length} is less than 1 byte")
        if self.max_length < self.min_length:
            raise UserError(
                f"--max-length: {self.max_length} is less than --min-length, {self.min_length}"
            )
        if self.max_length > _LARGEST_MAX_LENGTH:
            raise UserError(
                f"--max-length: {self.max_length} is more than {_LARGEST_MAX_LENGTH:,} bytes, and a"
                " document has to fit into memory"
            )

    @property
    def max_line(self) -> int:
        """Bytes of the longest line of JSON that is read."""
        # JSON writes one byte as at most six: "\u0000". So every text of `max_length` bytes fits.
        return 6 * self.max_length + _OTHER_FIELDS_BYTES
