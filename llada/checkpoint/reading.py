"""The weights of a training checkpoint by canonical name, read without the training engine, some
rows at a time.

A checkpoint's model/ folder is a torch.distributed.checkpoint: `.metadata` says which rectangle of
which tensor lies where in the `.distcp` files. Its pickle is read by an unpickler that knows the
classes of such metadata and nothing else. A rectangle is a torch.save'd tensor, whose values lie
uncompressed and in order in a zip archive: they are read from their place in the file, so memory
holds the rows that were asked for and nothing else.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llada.config.sections import ModelSection
from llada.errors import UserError
from llada.model import weights

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Loads torch.distributed.checkpoint metadata; any other class is refused, since a pickle can
    run code.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


MASTERS = "optimizer.state.param."
"""Before the name of a weight: its fp32 master."""


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: Any, first: int, length: int) -> None:
        self._file, self._first, self._length, self._position = file, first, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (
            offset
            + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        )
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._first + self._position)
        count: int = self._file.readinto(memoryview(buffer)[:wanted])
        self._position += count
        return count


def _values_start(
    file: Any, first: int, length: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> int:
    """Where in a file the values of a torch.save'd tensor start, which lies at byte `first`; it
    must be a plain one of these sizes.
    """
    window: Any = _Window(file, first, length)
    like = torch.load(window, map_location="meta", weights_only=True)  # reads no values
    plain = like.is_contiguous() and like.storage_offset() == 0
    if tuple(like.shape) != sizes or like.dtype != dtype or not plain:
        raise ValueError(
            f"it holds {like.dtype} {list(like.shape)}, the metadata says {dtype} {list(sizes)}"
        )
    with zipfile.ZipFile(_Window(file, first, length)) as archive:
        (entry,) = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        order = archive.read(entry.filename.replace("/data/0", "/byteorder"))
    if (
        entry.compress_type != zipfile.ZIP_STORED
        or entry.file_size != like.nbytes
        or order != b"little"
    ):
        raise ValueError("its values are not stored as they are")
    # PKWARE's APPNOTE 4.3.7: lengths of the name and of the extra field
    file.seek(first + entry.header_offset + 26)
    return first + entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def read_into(file: Any, values: torch.Tensor) -> None:
    """Fill a contiguous tensor from where an unbuffered file stands. Raises ValueError where it
    ends before.
    """
    left = values.view(-1).view(torch.uint8).numpy().data
    while left:
        count = file.readinto(left)
        if not count:
            raise ValueError("it ends too early")
        left = left[count:]


def write_from(file: Any, values: torch.Tensor) -> None:
    """Write a contiguous tensor to an unbuffered file."""
    left = values.view(-1).view(torch.uint8).numpy().data
    while left:
        left = left[file.write(left) :]


class StoredTensors:
    """The tensors of a torch.distributed.checkpoint folder.

    Args:
        folder: with `.metadata` and `.distcp` files.

    Raises:
        UserError: no such folder, or one that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            with open(folder / ".metadata", "rb") as file:
                metadata = _MetadataUnpickler(file).load()
            self._tensors = {
                name: value
                for name, value in metadata.state_dict_metadata.items()
                if hasattr(value, "chunks")
            }
            self._places = {
                (index.fqn, tuple(index.offset or ())): place
                for index, place in metadata.storage_data.items()
            }
        except OSError as error:
            raise UserError(
                f"checkpoint: {folder / '.metadata'} cannot be read ({error.strerror})"
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(
                f"checkpoint: {folder / '.metadata'} is damaged or not a checkpoint's ({error})"
            ) from None
        self._starts: dict[tuple[str, tuple[int, ...]], int] = {}
        self._layers: dict[str, dict[int, list[Any]]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer's fp32 masters are there: a run's own checkpoints have them,
        imported ones do not.
        """
        return any(name.startswith(MASTERS) for name in self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, first: int, last: int, layer: int | None = None) -> torch.Tensor:
        """Rows `first` to `last` of a tensor, or with `layer` of its element along axis 0. Only
        their bytes are read.

        Raises:
            UserError: a damaged file, or pieces that do not cover the rows.
        """
        skipped = int(layer is not None)
        out = torch.empty((last - first, *self.shape(name)[1 + skipped :]), dtype=self.dtype(name))
        filled = 0
        for chunk in self._chunks(name, layer):
            corner, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            offsets, shape = corner[skipped:], sizes[skipped:]
            start, stop = max(offsets[0], first), min(offsets[0] + shape[0], last)
            if start >= stop:
                continue
            before = (start - offsets[0]) * math.prod(shape[1:]) + (
                0 if layer is None else (layer - corner[0]) * math.prod(shape)
            )
            target = out[
                (
                    slice(start - first, stop - first),
                    *(slice(o, o + n) for o, n in zip(offsets[1:], shape[1:], strict=True)),
                )
            ]
            # whole rows go to their place at once
            values = target if target.is_contiguous() else torch.empty_like(target)
            self._read(name, corner, sizes, before, values)
            if values is not target:
                target.copy_(values)
            filled += values.numel()
        if filled != out.numel():
            raise UserError(
                f"checkpoint: {self.folder}: the pieces of {name} hold {filled} of {out.numel()}"
                " values, the checkpoint is damaged"
            )
        return out

    def _chunks(self, name: str, layer: int | None) -> list[Any]:
        if layer is None:
            return self._tensors[name].chunks
        if name not in self._layers:
            layers = self._layers[name] = defaultdict(list)
            for chunk in self._tensors[name].chunks:
                for index in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    layers[index].append(chunk)
        return self._layers[name].get(layer, [])

    def _read(
        self,
        name: str,
        corner: tuple[int, ...],
        sizes: tuple[int, ...],
        first: int,
        values: torch.Tensor,
    ) -> None:
        """Fill a contiguous tensor with the values of a piece from value `first` on."""
        place = self._places[name, corner]
        path = self.folder / Path(place.relative_path).name  # never outside the folder
        try:
            with open(path, "rb", buffering=0) as file:
                if (name, corner) not in self._starts:
                    self._starts[name, corner] = _values_start(
                        file, place.offset, place.length, sizes, values.dtype
                    )
                file.seek(self._starts[name, corner] + first * values.itemsize)
                read_into(file, values)
        except Exception as error:  # a damaged archive can raise anything
            raise UserError(
                f"checkpoint: {path} is damaged at {name} ({' '.join(str(error).split()[:20])})"
            ) from None


class CheckpointWeights:
    """A checkpoint's canonical tensors (`llada.model.weights.Weights`).

    Args:
        stored: the checkpoint's model folder.
        model: shape of the model.
        masters: the fp32 masters of the optimizer instead of the weights that the model computes
            with.

    Raises:
        UserError: tensors that are missing, too many or of other shapes; all are named.
    """

    def __init__(self, stored: StoredTensors, model: ModelSection, masters: bool = False) -> None:
        self._stored = stored
        self.shapes: Mapping[str, tuple[int, ...]] = weights.canonical_shapes(model)
        self._homes: dict[str, list[tuple[str, int | None, weights.WeightRectangle]]] = defaultdict(
            list
        )
        wanted: dict[str, tuple[int, ...]] = {}
        prefix = MASTERS if masters else ""
        for parameter in weights.parameter_names(model):
            name, layer = stored_name(parameter)
            shape = weights.parameter_shape(model, parameter)
            wanted[prefix + name] = shape if layer is None else (model.num_layers, *shape)
            for piece in sorted(weights.rectangles(model, parameter), key=lambda piece: piece.rows):
                self._homes[piece.name].append((prefix + name, layer, piece))
        self._check(wanted, prefix)

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._stored.dtype(self._homes[name][0][0])

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` of a canonical tensor."""
        found = []
        for stored, layer, piece in self._homes[name]:
            start, stop = max(first, piece.rows[0]), min(last, piece.rows[1])
            if start < stop:
                local = piece.local_row + start - piece.rows[0]
                found.append(self._stored.rows(stored, local, local + stop - start, layer))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _check(self, wanted: dict[str, tuple[int, ...]], prefix: str) -> None:
        names = [
            name
            for name in self._stored.names()
            if (name.startswith(prefix) if prefix else not name.startswith("optimizer."))
        ]
        problems = differences({name: self._stored.shape(name) for name in names}, wanted)
        if problems:
            raise UserError(
                f"checkpoint: {self._stored.folder} is not of its config's model: {problems}"
            )


def differences(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str:
    """Every tensor that is missing, too many or of another shape, as a line; empty where there is
    none.
    """
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} is {list(found[name])}, not {list(wanted[name])}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    parts = [("missing: ", missing), ("too many: ", extra), ("other shapes: ", shapes)]
    return "; ".join(what + ", ".join(names) for what, names in parts if names)


def all_rows(source: weights.Weights, name: str) -> torch.Tensor:
    """A whole canonical tensor."""
    return source.rows(name, 0, source.shapes[name][0])


_LAYER_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
}
"""Parameters of a layer and their names in a checkpoint, where all layers are stacked along axis 0.
"""


def stored_name(parameter: str) -> tuple[str, int | None]:
    """A parameter's name in a checkpoint, and its layer."""
    if not parameter.startswith("decoder.layers."):
        return parameter, None
    number, part = parameter.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{_LAYER_NAMES[part]}", int(number)
