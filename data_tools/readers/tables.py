"""Rows of Parquet and Arrow files and of Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from data_tools.readers.sources import DATASET, HUB, PARQUET, Extent, InputFile, Slice
from llada.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from data_tools.readers.reading import ReadOptions

_ROWS, _BYTES = 256, 16 << 20
"""Rows and bytes taken at a time: bounds memory whatever the size of a row group; one row may be
larger.
"""
_NAMES_SHOWN = 8


def measure(source: InputFile, options: ReadOptions) -> Extent:
    """How a source can be cut: row groups, record batches or rows.

    Raises:
        UserError: no such column or split.
        OSError: it cannot be read.
    """
    if source.format == DATASET:
        return _measure_dataset(source, options)
    with _refusals():
        if source.format == PARQUET:
            from pyarrow import parquet

            with parquet.ParquetFile(source.path) as file:
                columns = _columns(source, file.schema_arrow.names, options)
                sizes = [
                    _group_bytes(file.metadata.row_group(i), columns)
                    for i in range(file.num_row_groups)
                ]
        else:
            sizes = []
            for batch in _batches(source):
                columns = _columns(source, batch.schema.names, options)
                sizes.append(batch.nbytes if columns is None else batch.column(columns[0]).nbytes)
    return Extent(len(sizes), sum(sizes), sizes)


def rows(
    source: InputFile, part: Slice | None, options: ReadOptions
) -> tuple[int, Iterator[tuple[int, dict[str, Any]]]]:
    """The rows of a slice as dicts with the text's column (all columns with `options.structured`),
    numbered from 1, and how many rows of the source come before the slice. OSError while they are
    read: the file cannot be.
    """
    if source.format == DATASET:
        return _dataset_rows(source, part, options)
    with _refusals():
        return (
            _parquet_rows(source, part, options)
            if source.format == PARQUET
            else _arrow_rows(source, part, options)
        )


@contextmanager
def _refusals() -> Iterator[None]:
    """What the library raises for a broken file, as OSError."""
    from pyarrow.lib import ArrowException

    try:
        yield
    except ArrowException as error:
        raise OSError(" ".join(str(error).split())) from None


def _columns(source: InputFile, names: list[str], options: ReadOptions) -> list[str] | None:
    """The columns that are read; None: all."""
    if options.structured:
        return None
    if options.text_field not in names:
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        near = did_you_mean(options.text_field, names)
        raise UserError(
            f"--text-field: {source.path} has no column '{options.text_field}', there are:"
            f" {shown}{near}"
        )
    return [options.text_field]


def _numbered(batches: Iterator[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with _refusals():
        for batch in batches:
            step = _rows_at_once(batch.nbytes, batch.num_rows)
            for start in range(0, batch.num_rows, step):
                for row in _rows_of(batch.slice(start, step)):
                    number += 1
                    yield number, row


def _rows_at_once(size: int, rows: int) -> int:
    return max(1, min(_ROWS, _BYTES * rows // max(size, 1)))


def _rows_of(batch: Any) -> list[Any]:
    """Rows as dicts; in the place of one that is not UTF-8 the error."""
    try:
        rows: list[Any] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [row for i in range(batch.num_rows) for row in _rows_of(batch.slice(i, 1))]


# -- Parquet ---------------------------------------------------------------------------------------


def _group_bytes(group: Any, columns: list[str] | None) -> int:
    """Uncompressed bytes of the columns of a row group."""
    if columns is None:
        return int(group.total_byte_size)
    found = (group.column(i) for i in range(group.num_columns))
    return sum(
        int(column.total_uncompressed_size) for column in found if column.path_in_schema in columns
    )


def _parquet_rows(
    source: InputFile, part: Slice | None, options: ReadOptions
) -> tuple[int, Iterator[tuple[int, dict[str, Any]]]]:
    from pyarrow import parquet

    # pages as they are needed, not a whole row group
    file = parquet.ParquetFile(source.path, buffer_size=1 << 20)
    columns = _columns(source, file.schema_arrow.names, options)
    groups = range(file.num_row_groups) if part is None else range(part.start, part.stop)
    before = sum(file.metadata.row_group(i).num_rows for i in range(groups.start))
    sizes = [
        (_group_bytes(group, columns), group.num_rows)
        for group in map(file.metadata.row_group, groups)
    ]
    step = min((_rows_at_once(*size) for size in sizes), default=_ROWS)

    def batches() -> Iterator[Any]:
        with file:
            yield from file.iter_batches(
                batch_size=step, row_groups=list(groups), columns=columns, use_threads=False
            )

    return before, _numbered(batches())


# -- Arrow -----------------------------------------------------------------------------------------


def _batches(source: InputFile) -> Iterator[Any]:
    """Record batches of a file in either of Arrow's formats, memory-mapped."""
    import pyarrow as pa

    with pa.memory_map(source.path) as mapped:
        try:
            file = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            yield from pa.ipc.open_stream(mapped)
        else:
            yield from (file.get_batch(i) for i in range(file.num_record_batches))


def _arrow_rows(
    source: InputFile, part: Slice | None, options: ReadOptions
) -> tuple[int, Iterator[tuple[int, dict[str, Any]]]]:
    before = 0
    if part is not None:
        before = sum(batch.num_rows for i, batch in enumerate(_batches(source)) if i < part.start)

    def chosen() -> Iterator[Any]:
        for i, batch in enumerate(_batches(source)):
            if part is None or part.start <= i < part.stop:
                columns = _columns(source, batch.schema.names, options)
                yield batch if columns is None else batch.select(columns)

    return before, _numbered(chosen())


# -- Hugging Face datasets -------------------------------------------------------------------------


def dataset_stamp(path: str, options: ReadOptions) -> str:
    """The fingerprint of a dataset; of one that is streamed, the number of its files. Raises
    UserError when it cannot be loaded.
    """
    dataset = _dataset(path, options)
    return f"{dataset.num_shards} files" if options.streaming else str(dataset._fingerprint)


def _dataset(path: str, options: ReadOptions) -> Any:
    """A split of a dataset: saved by `save_to_disk`, a folder of files, or of the hub."""
    from pathlib import Path

    import datasets

    name = path.removeprefix(HUB)
    datasets.disable_progress_bars()
    try:
        if any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = _split_of(path, loaded, options.split)
            return loaded.to_iterable_dataset() if options.streaming else loaded
        return datasets.load_dataset(
            name,
            name=options.name,
            split=options.split,
            revision=options.revision,
            streaming=options.streaming,
        )
    except UserError:
        raise
    except Exception as error:  # the library and the hub raise dozens of kinds
        raise UserError(
            f"--input: {path}: cannot be loaded as a dataset ({type(error).__name__}:"
            f" {' '.join(str(error).split())})"
        ) from None


def _split_of(path: str, splits: Any, split: str) -> Any:
    if split not in splits:
        raise UserError(
            f"--split: {path} has no split '{split}', there are:"
            f" {', '.join(splits)}{did_you_mean(split, splits)}"
        )
    return splits[split]


def _measure_dataset(source: InputFile, options: ReadOptions) -> Extent:
    dataset = _dataset(source.path, options)
    names = dataset.column_names
    columns = None if names is None else _columns(source, names, options)
    if options.streaming:
        # How much a file holds is not known before it is read: each is a unit of its own.
        return Extent(dataset.num_shards, 0, [1 << 62] * dataset.num_shards)
    if columns is not None:
        dataset = dataset.select_columns(columns)
    return Extent(len(dataset), int(dataset.data.nbytes))


def _dataset_rows(
    source: InputFile, part: Slice | None, options: ReadOptions
) -> tuple[int, Iterator[tuple[int, dict[str, Any]]]]:
    dataset = _dataset(source.path, options)
    if (
        dataset.column_names is not None
        and (columns := _columns(source, dataset.column_names, options)) is not None
    ):
        dataset = dataset.select_columns(columns)
    if options.streaming:
        total = dataset.num_shards
        chosen = range(total) if part is None else range(part.start, part.stop)
        files = (row for i in chosen for row in dataset.shard(num_shards=total, index=i))
        return 0, enumerate(files, start=1)
    first, last = (0, len(dataset)) if part is None else part
    return first, enumerate(iter(dataset.select(range(first, last))), start=1)
