"""Records: the JSON values that lines, array elements and table rows contain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from data_tools.readers.options import ReadOptions
from llada.errors import UserError, did_you_mean

_MAX_NAMES = 8
"""Most names of fields or columns that a message shows."""


class BadRecord(Exception):
    """A record that its task cannot use.

    Args:
        reason: plural under which it is counted, such as "{records} without the field", where
            {records} stands for the name of the format's records.
        message: what is wrong with it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self._reason = reason

    def reason(self, records: str) -> str:
        """Return the reason for a format whose records are called "lines", "rows", ..."""
        # Not str.format: a reason may contain other braces.
        return self._reason.replace("{records}", records)


class BrokenFile(Exception):
    """A file whose content breaks off, or is not of its format from some place on."""


class Origin(NamedTuple):
    """Where a record was read.

    Attributes:
        path: path of the file, or name of the dataset.
        line: number of its line, element or row in the whole file, from 1.
    """

    path: str
    line: int


class Record(NamedTuple):
    """One line, array element or table row.

    Attributes:
        number: number in the slice that is read, from 1.
        value: parsed JSON value; a dict for a row of a table.
        problem: why there is no value; None if there is one.
    """

    number: int
    value: object
    problem: BadRecord | None = None


class RecordStream(NamedTuple):
    """The records of one slice of a source.

    Attributes:
        records: iterator over the records, in order.
        num_before: returns the number of records of the source before the slice. It is a function
            because counting lines means reading the file up to the slice, and most slices never
            need the number.
    """

    records: Iterator[Record]
    num_before: Callable[[], int]


def string_field(record: object, name: str, remedy: str) -> str:
    """Return the string in a field of a record.

    Args:
        record: JSON value of a record.
        name: name of the field.
        remedy: what the user can do about a missing field, for messages.

    Raises:
        BadRecord: not a JSON object, no such field, or not a string.
    """
    if not isinstance(record, dict) or name not in record:
        raise missing_field(record, name, remedy)
    text = record[name]
    if not isinstance(text, str):
        raise BadRecord(
            "{records} whose field is not a string",
            f"field '{name}' is not a string but {type(text).__name__}; {remedy}",
        )
    return text


def missing_field(record: object, name: str, remedy: str) -> BadRecord:
    """Return the error for a record that is not an object, or an object without a field."""
    if isinstance(record, dict):
        message = (
            f"field '{name}' is missing, there are: {_shortened(list(record))}"
            f"{did_you_mean(name, record)}"
        )
    else:
        message = f"a JSON {type(record).__name__}, not an object with the field '{name}'"
    return BadRecord("{records} without the field", f"{message}; {remedy}")


def columns_to_read(path: str, columns: Sequence[str], options: ReadOptions) -> list[str] | None:
    """Return the columns of a table that the options ask for; None: all of them.

    Raises:
        UserError: the table at `path` has no column `options.text_field`.
    """
    if options.text_field is None:
        return None
    if options.text_field not in columns:
        raise UserError(
            f"--text-field: {path} has no column '{options.text_field}', there are:"
            f" {_shortened(columns)}{did_you_mean(options.text_field, columns)}"
        )
    return [options.text_field]


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    if len(names) > _MAX_NAMES:
        shown += ", ..."
    return shown
