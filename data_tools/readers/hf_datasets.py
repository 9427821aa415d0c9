"""Hugging Face datasets (`hf:NAME`): a row is a record; cut by rows, a streamed one by files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from data_tools.readers.input_file import HUB, Extent, InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.records import Record, RecordStream, columns_to_read
from llada.errors import UserError, did_you_mean

# `datasets` ships no types that hold: Dataset or IterableDataset.
AnyDataset: TypeAlias = Any

_UNKNOWN_SIZE = 1 << 62
"""Bytes taken for a streamed file, whose size is unknown before it is read. They fill any unit of
work, so every file becomes a unit of its own.
"""


def dataset_stamp(path: str, options: ReadOptions) -> str:
    """Return what changes when a dataset does: its fingerprint, or of a streamed one the number of
    its files.

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


def read_dataset(source: InputFile, part: Slice | None, options: ReadOptions) -> RecordStream:
    """Read the rows of a slice (None: all) as dicts, with the columns to read.

    Raises:
        UserError: the dataset cannot be loaded, or has no such split or column.
    """
    dataset = _with_columns(_load(source.path, options), source, options)
    if options.streaming:
        # How many rows the files before the slice hold is unknown, so they are numbered from its
        # start.
        part = part or Slice(0, dataset.num_shards)
        return RecordStream(_records(_streamed_rows(dataset, part)), lambda: 0)
    part = part or Slice(0, len(dataset))
    first = part.start
    rows = dataset.select(range(part.start, part.stop))
    return RecordStream(_records(rows), lambda: first)


def _records(rows: Iterable[object]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(number, row)


def _streamed_rows(dataset: AnyDataset, part: Slice) -> Iterator[object]:
    for i in range(part.start, part.stop):
        yield from dataset.shard(num_shards=dataset.num_shards, index=i)


def _with_columns(dataset: AnyDataset, source: InputFile, options: ReadOptions) -> AnyDataset:
    """Keep the columns to read. A streamed dataset may not know its columns; then all stay."""
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
    except Exception as error:  # the library and the hub raise dozens of types
        raise UserError(
            f"--input: {path}: cannot be loaded as a dataset ({type(error).__name__}:"
            f" {' '.join(str(error).split())})"
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
