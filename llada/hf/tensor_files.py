"""The weight files of a Hugging Face folder, read and written a few rows at a time."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from llada.checkpoint.raw_values import read_into, write_from
from llada.errors import RunError, UserError, one_line
from llada.files import prefetch
from llada.model.weights import BLOCK_ELEMENTS, Weights, row_blocks

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The names of dtypes in safetensors files."""
_DTYPES = {code: dtype for dtype, code in CODES.items()}


class _Layout(NamedTuple):
    """File names of one format: a single file, or several files and an index."""

    index_file: str
    single_file: str


_SAFETENSORS = _Layout("model.safetensors.index.json", "model.safetensors")
_PICKLE = _Layout("pytorch_model.bin.index.json", "pytorch_model.bin")


class TensorFiles(Protocol):
    """The tensors of a folder by the names that they have there (`llada.model.weights.Weights`).

    Attributes:
        shapes: Shape of every tensor.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        ...

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of a tensor."""
        ...


def open_tensors(folder: Path, allow_pickle: bool, setting: str) -> TensorFiles:
    """Open the weights of a folder: safetensors, or with `allow_pickle` pytorch_model.bin.

    Raises:
        UserError: No weights; pickles without `allow_pickle`; an index that names a file that is
            missing or outside of the folder; a file that is damaged or does not contain what the
            index says; a dtype other than fp32, bf16 and fp16.
    """
    if _is_present(folder, _SAFETENSORS):
        return _SafetensorsFiles(folder)
    if not _is_present(folder, _PICKLE):
        raise UserError(
            f"{setting}: '{folder}' has no weights ({_SAFETENSORS.single_file},"
            f" {_SAFETENSORS.index_file} or {_PICKLE.single_file})"
        )
    if not allow_pickle:
        raise UserError(
            f"{setting}: '{folder}' has its weights as pickles ({_PICKLE.single_file}), which can"
            " run code when they are read; convert them to safetensors, or use `llada convert"
            " from-hf --allow-pickle` if you trust who made them"
        )
    return _PickleFiles(folder)


def _is_present(folder: Path, layout: _Layout) -> bool:
    return (folder / layout.index_file).is_file() or (folder / layout.single_file).is_file()


def _file_names(folder: Path, layout: _Layout) -> list[str]:
    """Names of a folder's weight files. With an index, every name in it is checked."""
    index = folder / layout.index_file
    if not index.is_file():
        return [layout.single_file]
    try:
        names = sorted(set(_weight_map(index).values()))
        # The index may come from a stranger: a name must not lead out of the folder.
        outside = [
            name
            for name in names
            if not isinstance(name, str) or Path(name).name != name or name in (".", "..")
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of weights ({error})") from None
    if outside:
        raise UserError(
            f"{index}: {outside[0]!r} is not a file name in this folder; an index must not"
            " lead out of it"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{index}: names files that are not there: {', '.join(missing)}")
    return names


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says."""
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"]


def _compare_with_index(folder: Path, layout: _Layout, file_of: Mapping[str, str]) -> None:
    """Raise UserError unless every tensor is in the file that the index names.

    Args:
        folder: The folder.
        layout: Its format.
        file_of: Tensor name -> name of the file that contains it.
    """
    index = folder / layout.index_file
    if not index.is_file():
        return
    listed = _weight_map(index)
    misplaced = sorted(name for name, file in listed.items() if file_of.get(name) != file)
    unlisted = sorted(file_of.keys() - listed.keys())
    problems = []
    if misplaced:
        problems.append(f"not in their files: {', '.join(misplaced)}")
    if unlisted:
        problems.append(f"not in the index: {', '.join(unlisted)}")
    if problems:
        raise UserError(f"{index}: {'; '.join(problems)}")


class _SafetensorsFiles:
    """Tensors of safetensors files.

    The library checks each file. Rows are then read directly from their offset in the file: the
    library's own slices would read the whole tensor, or count as memory of the process.
    """

    def __init__(self, folder: Path) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self._dtypes: dict[str, torch.dtype] = {}
        self._offsets: dict[str, tuple[Path, int]] = {}  # file, and byte of the first value
        file_of: dict[str, str] = {}
        for name in _file_names(folder, _SAFETENSORS):
            file_of |= dict.fromkeys(self._add(folder / name, shapes), name)
        _compare_with_index(folder, _SAFETENSORS, file_of)

    def _add(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> list[str]:
        """Read the header of one file, add its shapes to `shapes`; return its tensors' names."""
        try:
            with safe_open(path, "pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (no dict)
            offsets = _value_offsets(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a sound safetensors file ({one_line(error)})") from None
        for key, tensor in slices.items():
            code = tensor.get_dtype()
            if code not in _DTYPES:
                raise UserError(
                    f"{path}: {key} has dtype {code}; one of {', '.join(_DTYPES)} can be read"
                )
            shapes[key] = tuple(tensor.get_shape())
            self._dtypes[key] = _DTYPES[code]
            self._offsets[key] = (path, offsets[key])
        return list(slices)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        path, offset = self._offsets[name]
        shape = (last - first, *self.shapes[name][1:])
        values = torch.empty(shape, dtype=self._dtypes[name])
        bytes_per_row = math.prod(shape[1:]) * values.itemsize
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset + first * bytes_per_row)
                read_into(file, values)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error})") from None
        return values


def _value_offsets(path: Path) -> dict[str, int]:
    """The byte at which each tensor's values start in a sound safetensors file.

    The file is: length of the header (8 bytes, little-endian), header (JSON), values. Offsets in
    the header count from its end.
    """
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_length))
    header.pop("__metadata__", None)
    return {name: 8 + header_length + entry["data_offsets"][0] for name, entry in header.items()}


class _PickleFiles:
    """Tensors of pytorch_model.bin files, memory-mapped.

    torch's unpickler for weights reads tensors and containers only, so no code runs.
    """

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        file_of: dict[str, str] = {}
        for name in _file_names(folder, _PICKLE):
            tensors = self._load(folder / name)
            self._tensors |= tensors
            file_of |= dict.fromkeys(tensors, name)
        _compare_with_index(folder, _PICKLE, file_of)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in self._tensors.items()
        }

    @staticmethod
    def _load(path: Path) -> dict[str, torch.Tensor]:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path}: cannot be read as weights ({one_line(error)[:200]})"
            ) from None
        if not isinstance(content, dict) or not all(
            isinstance(value, torch.Tensor) for value in content.values()
        ):
            raise UserError(f"{path}: does not contain a dict of tensors")
        for name, tensor in content.items():
            if tensor.dtype not in CODES:
                raise UserError(
                    f"{path}: {name} has dtype {tensor.dtype}; fp32, bf16 and fp16 can be read"
                )
        return content

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self._tensors[name][first:last].clone()


def write_safetensors(folder: Path, source: Weights, dtype: torch.dtype, max_bytes: int) -> int:
    """Write weights as safetensors files, and an index if there are several.

    The library's own writer needs all tensors of a file in memory; this one needs a few rows. The
    same weights give the same bytes.

    Args:
        folder: Existing folder.
        source: The weights.
        dtype: Type of the values in the files.
        max_bytes: Largest size of a file's values. A larger tensor gets a file of its own.

    Returns:
        The number of files.

    Raises:
        RunError: A value that is not finite, or too large for `dtype`.
    """
    files = _distribute(source.shapes, dtype, max_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = _SAFETENSORS.single_file
        if len(files) > 1:
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / file, source, names, dtype)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        total_size = total_bytes(source.shapes, dtype)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / _SAFETENSORS.index_file).write_text(text, encoding="utf-8")
    return len(files)


def total_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Size of the values of all tensors, in bytes."""
    return sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())


def _distribute(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: int
) -> list[list[str]]:
    """Names of the tensors of each file: in order, as many as fit."""
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if files[-1] and used + size > max_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _write_file(path: Path, source: Weights, names: list[str], dtype: torch.dtype) -> None:
    """Write one file (see `_value_offsets` for its format)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + math.prod(source.shapes[name]) * dtype.itemsize
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(source.shapes[name]),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the values to 8 bytes
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # A thread reads and rounds the next rows while these are written.
        calls = (
            partial(_rounded, source, name, first, last, dtype)
            for name, first, last in _blocks(source, names)
        )
        for values in prefetch(calls):
            write_from(file, values)


def _blocks(source: Weights, names: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """(name, first row, last row) of consecutive blocks of rows of several tensors."""
    for name in names:
        for first, last in row_blocks(source.shapes[name], BLOCK_ELEMENTS):
            yield name, first, last


def _rounded(source: Weights, name: str, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a tensor, rounded to a dtype. Raises RunError for a value that is not finite then."""
    values = source.rows(name, first, last)
    rounded = values.to(dtype).contiguous()
    # Both bounds are NaN if any value is.
    smallest, largest = rounded.aminmax()
    if not (smallest.isfinite() and largest.isfinite()):
        _refuse(name, values, rounded, dtype)
    return rounded


def _refuse(name: str, values: torch.Tensor, rounded: torch.Tensor, dtype: torch.dtype) -> None:
    bad = values[~rounded.isfinite()][0].item()
    if math.isfinite(bad):
        largest = torch.finfo(dtype).max
        raise RunError(
            f"{name} holds {bad:g}, which {str(dtype).removeprefix('torch.')} cannot hold (its"
            f" largest value is {largest:g})"
        )
    raise RunError(f"{name} holds {bad}: these are the weights of a failed run")
