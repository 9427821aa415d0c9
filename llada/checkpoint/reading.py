"""The tensors of a checkpoint, read some rows at a time, without the training engine.

A checkpoint's model/ folder is a torch.distributed.checkpoint. Its `.metadata` says which rectangle
of which tensor lies where in the `.distcp` files; it is a pickle, and is read by an unpickler that
knows the classes of such metadata and no others. A rectangle is a tensor that `torch.save` wrote,
and its values are read from where they lie in the file. So memory holds the requested rows and
nothing else.
"""

from __future__ import annotations

import math
import pickle
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llada.checkpoint.raw_values import find_values, read_into
from llada.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

MASTER_PREFIX = "optimizer.state.param."
"""Prefix of a stored tensor's name: the fp32 master of the weight whose name follows."""

_METADATA_CLASSES = {
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
"""Module -> classes that a checkpoint's metadata may consist of, besides torch's dtypes."""


class _MetadataUnpickler(pickle.Unpickler):
    """Loads torch.distributed.checkpoint metadata.

    Any other class is refused, since a pickle that may name any class can run any code.
    """

    def find_class(self, module: str, name: str) -> object:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class StoredTensors:
    """The tensors of a torch.distributed.checkpoint folder.

    Args:
        folder: with `.metadata` and `.distcp` files.

    Raises:
        UserError: there is no such folder, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._storage: dict[tuple[str, tuple[int, ...]], _StorageInfo] = {}
        """Tensor name and first index of a rectangle -> file, offset and length."""
        self._value_offsets: dict[tuple[str, tuple[int, ...]], int] = {}
        """The same key -> where in the file the values begin, filled as they are read."""
        self._chunks_of_layers: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        try:
            self._read_metadata(folder / ".metadata")
        except OSError as error:
            raise UserError(
                f"checkpoint: {folder / '.metadata'} cannot be read ({error.strerror})"
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(
                f"checkpoint: {folder / '.metadata'} is damaged or not a checkpoint's ({error})"
            ) from None

    def _read_metadata(self, path: Path) -> None:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        for name, value in metadata.state_dict_metadata.items():
            if hasattr(value, "chunks"):  # a tensor; the others are pickled objects
                self._tensors[name] = value
        for index, storage in metadata.storage_data.items():
            self._storage[index.fqn, tuple(index.offset or ())] = storage

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer's fp32 masters are stored.

        A run's own checkpoints have them, imported ones do not.
        """
        return any(name.startswith(MASTER_PREFIX) for name in self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in."""
        return self._tensors[name].properties.dtype

    def rows(self, name: str, first: int, last: int, layer: int | None = None) -> torch.Tensor:
        """Read rows `first` to `last` (exclusive) of a tensor, and no other bytes.

        Args:
            name: name of the tensor.
            first, last: rows.
            layer: None, or an index along axis 0 of a tensor in which all layers are stacked; the
                rows are then those of this layer, along axis 1.

        Raises:
            UserError: a damaged file, or rectangles that do not cover the rows.
        """
        # Axes of the stored tensor that the result does not have.
        num_leading = int(layer is not None)
        row_shape = self.shape(name)[1 + num_leading :]
        out = torch.empty((last - first, *row_shape), dtype=self.dtype(name))
        filled = 0
        for chunk in self._chunks(name, layer):
            offsets = tuple(chunk.offsets)
            sizes = tuple(chunk.sizes)
            # The rectangle within its layer.
            corner = offsets[num_leading:]
            shape = sizes[num_leading:]
            start = max(corner[0], first)
            stop = min(corner[0] + shape[0], last)
            if start >= stop:
                continue
            # How many of the rectangle's values precede the first one to be read.
            skipped = (start - corner[0]) * math.prod(shape[1:])
            if layer is not None:
                skipped += (layer - offsets[0]) * math.prod(shape)
            columns = tuple(
                slice(column, column + width)
                for column, width in zip(corner[1:], shape[1:], strict=True)
            )
            target = out[(slice(start - first, stop - first), *columns)]
            if target.is_contiguous():  # whole rows: they are read into the result itself
                self._read_values(name, offsets, sizes, skipped, target)
            else:
                values = torch.empty_like(target)
                self._read_values(name, offsets, sizes, skipped, values)
                target.copy_(values)
            filled += target.numel()
        if filled != out.numel():
            raise UserError(
                f"checkpoint: {self.folder}: the rectangles of {name} hold {filled} of"
                f" {out.numel()} values, the checkpoint is damaged"
            )
        return out

    def _chunks(self, name: str, layer: int | None) -> list[ChunkStorageMetadata]:
        """Return the rectangles of a tensor, or those that hold a part of one layer."""
        if layer is None:
            return self._tensors[name].chunks
        if name not in self._chunks_of_layers:
            # An index, since a large model has thousands of rectangles for each of its layers.
            chunks_of = defaultdict(list)
            for chunk in self._tensors[name].chunks:
                first = chunk.offsets[0]
                for index in range(first, first + chunk.sizes[0]):
                    chunks_of[index].append(chunk)
            self._chunks_of_layers[name] = chunks_of
        return self._chunks_of_layers[name].get(layer, [])

    def _read_values(
        self,
        name: str,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        skipped: int,
        values: torch.Tensor,
    ) -> None:
        """Fill a contiguous tensor with the values of a rectangle.

        Args:
            name: name of the stored tensor.
            offsets, sizes: offset and size of the rectangle along each axis.
            skipped: values of the rectangle before the first one to be read.
            values: to be filled.
        """
        storage = self._storage[name, offsets]
        # Only the last part of the stored path: it cannot lead out of the folder.
        path = self.folder / Path(storage.relative_path).name
        try:
            with open(path, "rb", buffering=0) as file:
                if (name, offsets) not in self._value_offsets:
                    self._value_offsets[name, offsets] = find_values(
                        file, storage.offset, storage.length, sizes, values.dtype
                    )
                file.seek(self._value_offsets[name, offsets] + skipped * values.itemsize)
                read_into(file, values)
        except Exception as error:  # a damaged archive can raise anything
            reason = " ".join(str(error).split()[:20])
            raise UserError(f"checkpoint: {path} is damaged at {name} ({reason})") from None
