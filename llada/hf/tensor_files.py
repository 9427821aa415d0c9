"""The weight files of a Hugging Face folder: read and written some rows at a time."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from llada.checkpoint.raw_values import read_into, write_from
from llada.errors import RunError, UserError
from llada.files import prefetch
from llada.model.weights import BLOCK_ELEMENTS, Weights, row_blocks

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLE_INDEX, _PICKLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


class TensorFiles(Protocol):
    """The tensors of a folder by the names they have there.

    Attributes:
        shapes, dtypes: of every tensor.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` of a tensor."""
        ...


def open_tensors(folder: Path, allow_pickle: bool, setting: str) -> TensorFiles:
    """The weights of a folder: safetensors, or with `allow_pickle` pytorch_model.bin.

    Raises:
        UserError: no weights, or pickles without leave; an index that names a file that is missing
            or outside of the folder; a file that is damaged or does not hold what the index says; a
            dtype that is not fp32, bf16 or fp16.
    """
    if (folder / _INDEX).is_file() or (folder / _SINGLE).is_file():
        return _Safetensors(folder)
    if not ((folder / _PICKLE_INDEX).is_file() or (folder / _PICKLE).is_file()):
        raise UserError(f"{setting}: '{folder}' has no weights ({_SINGLE}, {_INDEX} or {_PICKLE})")
    if not allow_pickle:
        raise UserError(
            f"{setting}: '{folder}' has its weights as pickles ({_PICKLE}), which can run code when"
            " they are read; convert them to safetensors, or use `llada convert from-hf"
            " --allow-pickle` if you trust who made them"
        )
    return _Pickles(folder)


def _files(folder: Path, index: str, single: str) -> dict[str, Path | None]:
    """File names of a folder's weights; with an index, every name in it is checked."""
    if not (folder / index).is_file():
        return {single: None}
    try:
        listed = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
        bad = [
            name
            for name in names
            if not isinstance(name, str) or Path(name).name != name or name in (".", "..")
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / index}: not an index of weights ({error})") from None
    if bad:
        raise UserError(
            f"{folder / index}: {bad[0]!r} is not a file name in this folder; an index must not"
            " lead out of it"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder / index}: names files that are not there: {', '.join(missing)}")
    return dict.fromkeys(names)


def _compare_with_index(folder: Path, index: str, where: Mapping[str, str]) -> None:
    """Every tensor must lie in the file that the index says."""
    if not (folder / index).is_file():
        return
    listed = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
    gone = sorted(name for name, file in listed.items() if where.get(name) != file)
    extra = sorted(where.keys() - listed.keys())
    if gone or extra:
        parts = [("not in their files: ", gone), ("not in the index: ", extra)]
        raise UserError(
            f"{folder / index}: "
            + "; ".join(what + ", ".join(names) for what, names in parts if names)
        )


class _Safetensors:
    """Tensors of safetensors files. The library checks a file; rows are then read from their place
    in it: its own slices would read the whole tensor, or count as memory of the process.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        where: dict[str, str] = {}
        for name in _files(folder, _INDEX, _SINGLE):
            try:
                with safe_open(folder / name, "pt") as file:
                    tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
                starts = _value_starts(folder / name)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{folder / name}: not a sound safetensors file"
                    f" ({' '.join(str(error).split())})"
                ) from None
            for key, tensor in tensors.items():
                if tensor.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{folder / name}: {key} has dtype {tensor.get_dtype()}; one of"
                        f" {', '.join(_DTYPES)} can be read"
                    )
                self.shapes[key], self.dtypes[key] = (
                    tuple(tensor.get_shape()),
                    _DTYPES[tensor.get_dtype()],
                )
                self._places[key], where[key] = (folder / name, starts[key]), name
        _compare_with_index(folder, _INDEX, where)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        path, start = self._places[name]
        shape = (last - first, *self.shapes[name][1:])
        values = torch.empty(shape, dtype=self.dtypes[name])
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start + first * math.prod(shape[1:]) * values.itemsize)
                read_into(file, values)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error})") from None
        return values


def _value_starts(path: Path) -> dict[str, int]:
    """Where in a sound safetensors file the values of each tensor start."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


class _Pickles:
    """Tensors of pytorch_model.bin files, by torch's unpickler for weights alone, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        where: dict[str, str] = {}
        for name in _files(folder, _PICKLE_INDEX, _PICKLE):
            try:
                found = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
                raise UserError(
                    f"{folder / name}: cannot be read as weights"
                    f" ({' '.join(str(error).split())[:200]})"
                ) from None
            if not isinstance(found, dict) or not all(
                isinstance(value, torch.Tensor) for value in found.values()
            ):
                raise UserError(f"{folder / name}: does not hold a dict of tensors")
            wrong = [key for key, value in found.items() if value.dtype not in CODES]
            if wrong:
                raise UserError(
                    f"{folder / name}: {wrong[0]} has dtype {found[wrong[0]].dtype}; fp32, bf16 and"
                    " fp16 can be read"
                )
            self._tensors |= found
            where |= dict.fromkeys(found, name)
        _compare_with_index(folder, _PICKLE_INDEX, where)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self._tensors[name][first:last].clone()


def write_safetensors(folder: Path, source: Weights, dtype: torch.dtype, limit: int) -> int:
    """Write safetensors files of at most `limit` bytes (a larger tensor gets its own), and their
    index if there are several.

    The library's own writer wants all tensors of a file in memory; this one holds some rows. The
    same weights give the same bytes.

    Returns how many files.

    Raises:
        RunError: a value that is not finite, or that is not in `dtype`.
    """
    files = _deal(source.shapes, dtype, limit)
    index: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = _SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / file, source, names, dtype)
        index |= dict.fromkeys(names, file)
    if len(files) > 1:
        content = {
            "metadata": {"total_size": total_bytes(source.shapes, dtype)},
            "weight_map": index,
        }
        (folder / _INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return len(files)


def total_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Of all values of these tensors."""
    return sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())


def _deal(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Which tensors go into which file, in order."""
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if files[-1] and used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _write_file(path: Path, source: Weights, names: list[str], dtype: torch.dtype) -> None:
    """One file: the length of the header (8 bytes), the header in JSON padded to 8 bytes, the
    values one tensor after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + math.prod(source.shapes[name]) * dtype.itemsize
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(source.shapes[name]),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        blocks = (
            (name, *block)
            for name in names
            for block in row_blocks(source.shapes[name], BLOCK_ELEMENTS)
        )
        for values in prefetch(partial(_rounded, source, *block, dtype) for block in blocks):
            write_from(file, values)


def _rounded(source: Weights, name: str, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a tensor in a dtype. Raises RunError for a value that is not finite there."""
    values = source.rows(name, first, last)
    rounded = values.to(dtype).contiguous()
    if not all(bound.isfinite() for bound in rounded.aminmax()):  # both are nan if a value is
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
    raise RunError(f"{name} holds {bad}: the weights are of a run that failed")
