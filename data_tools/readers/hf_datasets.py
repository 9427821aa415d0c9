"""Hugging Face datasets (`hf:NAME`): one record per row, cut by rows, or by files if streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from data_tools.readers.input_file import HUB, Extent, InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import Record, RecordStream, columns_to_read
from data_tools.readers.report import Report
from llada.errors import UserError, did_you_mean, one_line

# A Dataset or an IterableDataset. `datasets` ships no types that can be relied on.
AnyDataset: TypeAlias = Any

_UNKNOWN_SIZE = 1 << 62
"""Bytes assumed for a streamed file, whose size is unknown before it is read. They fill any unit of
work, so each file becomes a unit of its own.
"""


def dataset_stamp(path: str, options: ReadOptions) -> str:
    """Return a value that changes with the dataset: its fingerprint, or the number of its files if
    it is streamed.

    Raises:
        UserError: it cannot be loaded.
    """
    dataset = _load(path, options)
    if options.streaming:
        return f"{dataset.num_shards} files"
    return str(dataset._fingerprint)


def measure_dataset(source: InputFile, options: ReadOptions) -> Extent:
    """Return how a dataset can be cut.

    Raises:
        UserError: it cannot be loaded, or has no such split or column.
    """
    dataset = _with_columns(_load(source.path, options), source, options)
    if options.streaming:
        return Extent(dataset.num_shards, 0, [_UNKNOWN_SIZE] * dataset.num_shards)
    return Extent(len(dataset), int(dataset.data.nbytes))


def read_dataset(
    source: InputFile, slice_: Slice | None, options: ReadOptions, report: Report
) -> RecordStream:
    """Read the rows of a slice (None: all rows) as dicts, with the columns to read.

    Raises:
        UserError: the dataset cannot be loaded, or has no such split or column.
    """
    dataset = _with_columns(_load(source.path, options), source, options)
    if options.streaming:
        # How many rows come before the slice is unknown, so rows are numbered from its start.
        slice_ = slice_ or Slice(0, dataset.num_shards)
        return RecordStream(_records(_streamed_rows(dataset, slice_)), lambda: 0)
    start, stop = slice_ or Slice(0, len(dataset))
    rows = dataset.select(range(start, stop))
    return RecordStream(_records(rows), lambda: start)


def _records(rows: Iterable[object]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(number, row)


def _streamed_rows(dataset: AnyDataset, slice_: Slice) -> Iterator[object]:
    for i in range(slice_.start, slice_.stop):
        yield from dataset.shard(num_shards=dataset.num_shards, index=i)


def _with_columns(dataset: AnyDataset, source: InputFile, options: ReadOptions) -> AnyDataset:
    """Keep the columns to read. A streamed dataset may not know its columns; then it keeps all."""
    if dataset.column_names is None:
        return dataset
    columns = columns_to_read(source.path, dataset.column_names, options)
    if columns is None:
        return dataset
    return dataset.select_columns(columns)


def _load(path: str, options: ReadOptions) -> AnyDataset:
    """Load a split of a dataset: saved by `save_to_disk`, a folder of files, or from the hub."""
    import datasets

    name = path.removeprefix(HUB)
    datasets.disable_progress_bars()
    try:
        if _is_saved(name):
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = _choose_split(path, loaded, options.split)
            if options.streaming:
                return loaded.to_iterable_dataset()
            return loaded
        return datasets.load_dataset(
            name,
            name=options.name,
            split=options.split,
            revision=options.revision,
            streaming=options.streaming,
        )
    except UserError:
        raise
    except Exception as error:  # the library and the hub raise dozens of types
        raise UserError(
            f"--input: {path}: cannot be loaded as a dataset ({type(error).__name__}:"
            f" {one_line(error)})"
        ) from None


def _is_saved(folder: str) -> bool:
    """Return whether `save_to_disk` wrote the folder: a dataset, or a dictionary of splits."""
    return Path(folder, "state.json").is_file() or Path(folder, "dataset_dict.json").is_file()


def _choose_split(path: str, splits: dict[str, AnyDataset], split: str) -> AnyDataset:
    if split not in splits:
        raise UserError(
            f"--split: {path} has no split '{split}', there are:"
            f" {', '.join(splits)}{did_you_mean(split, splits)}"
        )
    return splits[split]
