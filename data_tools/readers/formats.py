"""The formats of inputs. A new one is a module with its two functions, and an entry in FORMATS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.readers.hf_datasets import measure_dataset, read_dataset
from data_tools.readers.input_file import (
    COMPRESSED,
    Extent,
    InputFile,
    Slice,
    extension,
    measure_whole_file,
)
from data_tools.readers.json_arrays import holds_array, read_json_array
from data_tools.readers.json_lines import measure_json_lines, read_json_lines
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import RecordStream
from data_tools.readers.report import Report
from data_tools.readers.tables import measure_arrow, measure_parquet, read_arrow, read_parquet
from data_tools.readers.text_files import read_text_file

TEXT = "text"
JSONL = "jsonl"
ARRAY = "json array"
PARQUET = "parquet"
ARROW = "arrow"
DATASET = "dataset"
"""A dataset that the `datasets` library loads."""


@dataclass(frozen=True)
class Format:
    """How sources of one format are read.

    Attributes:
        measure: returns how a source can be cut. If the format has columns, it calls
            `columns_to_read`, so that a wrong --text-field fails at the start and not on the first
            row. Raises OSError for a file that cannot be read.
        read: reads the records of a slice of a source; without a slice, of the whole source. Memory
            is bounded, however long a record is: where a record is a line, an element or a whole
            file, one of more than `options.max_line` (a whole file: `options.max_length`) bytes is
            never in memory as a whole, but skipped and reported with `report.leave_out`. A problem
            of one record goes into the record. Raises OSError, EOFError, zlib.error, BrokenFile or
            UnicodeDecodeError for a file that cannot be read, or breaks off.
        extensions: lower-case extensions of its files, without that of a compression.
        has_fields: whether its records have fields of their own. A text file is one record, whose
            only field is its text.
        may_be_compressed: whether its files may be compressed with gzip or zstandard.
        is_opened_to_measure: whether `measure` opens a file, so that one that cannot be read is
            noticed before the work begins.
        records: what messages and the counts of what was left out call several records.
        position: how messages add the number of a record to the path of its source.
    """

    measure: Callable[[InputFile, ReadOptions], Extent]
    read: Callable[[InputFile, Slice | None, ReadOptions, Report], RecordStream]
    extensions: tuple[str, ...] = ()
    has_fields: bool = True
    may_be_compressed: bool = True
    is_opened_to_measure: bool = False
    records: str = "lines"
    position: str = ":{number}"


FORMATS = {
    TEXT: Format(measure_whole_file, read_text_file, has_fields=False),
    JSONL: Format(measure_json_lines, read_json_lines, extensions=(".jsonl", ".json")),
    ARRAY: Format(
        measure_whole_file,
        read_json_array,
        records="elements",
        position=", element {number}",
    ),
    PARQUET: Format(
        measure_parquet,
        read_parquet,
        extensions=(".parquet",),
        may_be_compressed=False,
        is_opened_to_measure=True,
        records="rows",
    ),
    ARROW: Format(
        measure_arrow,
        read_arrow,
        extensions=(".arrow",),
        may_be_compressed=False,
        is_opened_to_measure=True,
        records="rows",
    ),
    DATASET: Format(measure_dataset, read_dataset, is_opened_to_measure=True, records="rows"),
}
"""The formats by name. A plan records the names."""


def _names_by_extension() -> dict[str, str]:
    names: dict[str, str] = {}
    for name, format in FORMATS.items():
        for own in format.extensions:
            names[own] = name
    return names


NAMES_BY_EXTENSION = _names_by_extension()
"""Names of formats by extension; a file with any other extension is text."""


def format_of(path: Path) -> str:
    """Return the name of a file's format."""
    own = extension(path)
    # Only its content tells whether a .json file is JSON Lines or an array.
    if own == ".json" and holds_array(str(path)):
        return ARRAY
    return NAMES_BY_EXTENSION.get(own, TEXT)


def list_extensions() -> str:
    """List all extensions for a message: ".jsonl, .json (also with .gz or .zst), .parquet, ..."."""
    listed: list[str] = []
    for format in FORMATS.values():
        if format.extensions:
            own = ", ".join(format.extensions)
            if format.may_be_compressed:
                own += f" (also with {' or '.join(COMPRESSED)})"
            listed.append(own)
    return ", ".join(listed)
