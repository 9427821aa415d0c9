"""Parquet and Arrow files: one record per row, cut by row groups (Parquet) or record batches
(Arrow).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from data_tools.readers.input_file import Extent, InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import BadRecord, Record, RecordStream, columns_to_read
from data_tools.readers.report import Report
from llada.errors import one_line

# pyarrow ships no types.
RecordBatch: TypeAlias = Any
RowGroup: TypeAlias = Any

_MAX_ROWS = 256
_MAX_BYTES = 16 << 20
"""Most rows and bytes that become Python objects at a time: bounds memory, however large a row
group is. A single row may be larger.
"""


def measure_parquet(source: InputFile, options: ReadOptions) -> Extent:
    """Return how a Parquet file can be cut; its text is that of the columns to read.

    Raises:
        UserError: no column `options.text_field`.
        OSError: the file cannot be read.
    """
    with _arrow_errors():
        sizes = _parquet_sizes(source, options)
    return Extent(len(sizes), sum(sizes), sizes)


def measure_arrow(source: InputFile, options: ReadOptions) -> Extent:
    """Return how an Arrow file can be cut; its text is that of the columns to read.

    Raises:
        UserError: no column `options.text_field`.
        OSError: the file cannot be read.
    """
    with _arrow_errors():
        sizes = _arrow_sizes(source, options)
    return Extent(len(sizes), sum(sizes), sizes)


def read_parquet(
    source: InputFile, slice_: Slice | None, options: ReadOptions, report: Report
) -> RecordStream:
    """Read the rows of a slice (None: all rows) as dicts, with the columns to read.

    Raises:
        UserError: no column `options.text_field`.
        OSError: the file cannot be read; also while the records are iterated over.
    """
    with _arrow_errors():
        return _open_parquet(source, slice_, options)


def read_arrow(
    source: InputFile, slice_: Slice | None, options: ReadOptions, report: Report
) -> RecordStream:
    """Read the rows of a slice (None: all rows) as dicts, with the columns to read.

    Raises:
        UserError: no column `options.text_field`.
        OSError: the file cannot be read; also while the records are iterated over.
    """
    with _arrow_errors():
        return _open_arrow(source, slice_, options)


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Turn what pyarrow raises for a broken file into OSError."""
    from pyarrow.lib import ArrowException

    try:
        yield
    except ArrowException as error:
        raise OSError(one_line(error)) from None


def _records(batches: Iterator[RecordBatch]) -> Iterator[Record]:
    """Number the rows of batches from 1."""
    number = 0
    with _arrow_errors():
        for batch in batches:
            step = _rows_per_step(batch.nbytes, batch.num_rows)
            for start in range(0, batch.num_rows, step):
                for row, problem in _rows(batch.slice(start, step)):
                    number += 1
                    yield Record(number, row, problem)


def _rows_per_step(num_bytes: int, num_rows: int) -> int:
    """Return how many of `num_rows` rows, together of `num_bytes`, are converted at a time."""
    fit = _MAX_BYTES * num_rows // max(num_bytes, 1)
    return max(1, min(_MAX_ROWS, fit))


def _rows(batch: RecordBatch) -> Iterator[tuple[object, BadRecord | None]]:
    """Yield every row as a dict, or None and what is wrong with it."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        # pyarrow does not say which row is wrong, so the rows are converted one by one.
        if batch.num_rows == 1:
            yield None, BadRecord("{records} not UTF-8", f"not UTF-8 ({error.reason})")
            return
        for i in range(batch.num_rows):
            yield from _rows(batch.slice(i, 1))
        return
    for row in rows:
        yield row, None


# -- Parquet ---------------------------------------------------------------------------------------


def _parquet_sizes(source: InputFile, options: ReadOptions) -> list[int]:
    """Uncompressed bytes of each row group."""
    from pyarrow import parquet

    with parquet.ParquetFile(source.path) as file:
        columns = columns_to_read(source.path, file.schema_arrow.names, options)
        groups = range(file.num_row_groups)
        return [_group_bytes(file.metadata.row_group(i), columns) for i in groups]


def _group_bytes(group: RowGroup, columns: list[str] | None) -> int:
    """Uncompressed bytes of the columns of a row group; None: of all columns."""
    if columns is None:
        return int(group.total_byte_size)
    size = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema in columns:
            size += int(column.total_uncompressed_size)
    return size


def _open_parquet(source: InputFile, slice_: Slice | None, options: ReadOptions) -> RecordStream:
    from pyarrow import parquet

    # With a buffer, pages are read as they are needed; without one, whole row groups.
    file = parquet.ParquetFile(source.path, buffer_size=1 << 20)
    columns = columns_to_read(source.path, file.schema_arrow.names, options)
    start, stop = slice_ or Slice(0, file.num_row_groups)
    num_before = sum(file.metadata.row_group(i).num_rows for i in range(start))
    step = _MAX_ROWS
    for i in range(start, stop):
        group = file.metadata.row_group(i)
        step = min(step, _rows_per_step(_group_bytes(group, columns), group.num_rows))

    def batches() -> Iterator[RecordBatch]:
        with file:
            yield from file.iter_batches(
                batch_size=step,
                row_groups=list(range(start, stop)),
                columns=columns,
                use_threads=False,
            )

    return RecordStream(_records(batches()), lambda: num_before)


# -- Arrow -----------------------------------------------------------------------------------------


def _arrow_batches(source: InputFile) -> Iterator[RecordBatch]:
    """Yield the record batches of a file in either of Arrow's formats, memory-mapped."""
    import pyarrow as pa

    with pa.memory_map(source.path) as mapped:
        try:
            file = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:
            # Not the file format, so it must be the stream format, which `datasets` writes.
            mapped.seek(0)
            yield from pa.ipc.open_stream(mapped)
        else:
            for i in range(file.num_record_batches):
                yield file.get_batch(i)


def _arrow_sizes(source: InputFile, options: ReadOptions) -> list[int]:
    """Bytes of each record batch."""
    sizes = []
    for batch in _arrow_batches(source):
        columns = columns_to_read(source.path, batch.schema.names, options)
        if columns is not None:
            batch = batch.column(columns[0])
        sizes.append(batch.nbytes)
    return sizes


def _open_arrow(source: InputFile, slice_: Slice | None, options: ReadOptions) -> RecordStream:
    num_before = 0
    if slice_ is not None:
        for i, batch in enumerate(_arrow_batches(source)):
            if i < slice_.start:
                num_before += batch.num_rows

    def batches() -> Iterator[RecordBatch]:
        for i, batch in enumerate(_arrow_batches(source)):
            if slice_ is None or slice_.start <= i < slice_.stop:
                columns = columns_to_read(source.path, batch.schema.names, options)
                if columns is not None:
                    batch = batch.select(columns)
                yield batch

    return RecordStream(_records(batches()), lambda: num_before)
