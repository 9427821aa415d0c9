"""The weights of a training checkpoint by canonical name, read without the training engine.

A checkpoint's model/ folder is a torch.distributed.checkpoint: `.metadata` says which rectangle of which tensor lies where in the
`.distcp` files. Its pickle is read by an unpickler that knows the classes of such metadata and nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llada.errors import UserError
from llada.model import weights
from llada.settings import ModelSection

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
    "torch.distributed.checkpoint.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Loads torch.distributed.checkpoint metadata; any other class is refused, since a pickle can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


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
            self._tensors = {name: value for name, value in metadata.state_dict_metadata.items() if hasattr(value, "chunks")}
            self._places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
        except OSError as error:
            raise UserError(f"checkpoint: {folder / '.metadata'} cannot be read ({error.strerror})") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"checkpoint: {folder / '.metadata'} is damaged or not a checkpoint's ({error})") from None

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._tensors[name].properties.dtype

    def read(self, name: str, first: int | None = None) -> torch.Tensor:
        """A whole tensor, or its element `first` along axis 0; only the pieces that meet it are read."""
        size = self.shape(name)
        low, high = (0, size[0]) if first is None else (first, first + 1)
        out = torch.empty((high - low, *size[1:]), dtype=self.dtype(name))
        filled = 0
        for chunk in self._tensors[name].chunks:
            start, stop = max(chunk.offsets[0], low), min(chunk.offsets[0] + chunk.sizes[0], high)
            if start >= stop:
                continue
            piece = self._piece(name, tuple(chunk.offsets), tuple(chunk.sizes))[start - chunk.offsets[0] : stop - chunk.offsets[0]]
            inner = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
            out[(slice(start - low, stop - low), *inner)] = piece
            filled += piece.numel()
        if filled != out.numel():
            raise UserError(
                f"checkpoint: {self.folder}: the pieces of {name} hold {filled} of {out.numel()} values, the checkpoint is damaged"
            )
        return out if first is None else out[0]

    def _piece(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        place = self._places[name, offsets]
        path = self.folder / Path(place.relative_path).name  # never outside the folder
        try:
            with open(path, "rb") as file:
                file.seek(place.offset)
                piece = torch.load(io.BytesIO(file.read(place.length)), weights_only=True, map_location="cpu")
        except Exception as error:
            raise UserError(f"checkpoint: {path} is damaged at {name} ({' '.join(str(error).split()[:20])})") from None
        if tuple(piece.shape) != sizes:
            raise UserError(f"checkpoint: {path} holds {tuple(piece.shape)} for {name}, its metadata says {sizes}")
        return piece


def canonical_weights(stored: StoredTensors, model: ModelSection) -> Iterator[tuple[str, torch.Tensor]]:
    """Every canonical tensor of a checkpoint, layer by layer in the order of `weights.canonical_shapes`.

    Args:
        stored: the checkpoint's model folder.
        model: shape of the model.

    Raises:
        UserError: a tensor that is missing or has another shape.
    """
    yield from _assemble(stored, model, "embedding.word_embeddings.weight")
    for layer in range(model.num_layers):
        found = dict(pair for name in _LAYER_NAMES for pair in _assemble(stored, model, f"decoder.layers.{layer}.{name}"))
        yield from ((name, found[name]) for name in weights.canonical_shapes(model) if name in found)
    yield from _assemble(stored, model, "decoder.final_layernorm.weight")
    if not model.tie_embeddings:
        yield from _assemble(stored, model, "output_layer.weight")


_LAYER_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
}
"""Parameters of a layer and their names in a checkpoint, where all layers are stacked along axis 0."""


def _assemble(stored: StoredTensors, model: ModelSection, parameter: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The canonical tensors that make up a Megatron parameter, which checkpoints hold as one unsharded tensor."""
    shapes = weights.canonical_shapes(model)
    pieces = weights.pieces(model, parameter)
    rows = sum(piece.rows[1] - piece.rows[0] for piece in pieces)
    wanted = (rows,) if pieces[0].columns is None else (rows, pieces[0].columns[1])
    tensor = _read_parameter(stored, parameter, wanted)
    for name in dict.fromkeys(piece.name for piece in pieces):
        whole = torch.empty(shapes[name], dtype=tensor.dtype)
        for piece in pieces:
            if piece.name == name:
                whole[slice(*piece.rows)] = tensor[piece.local_row : piece.local_row + piece.rows[1] - piece.rows[0]]
        yield name, whole


def _read_parameter(stored: StoredTensors, parameter: str, wanted: tuple[int, ...]) -> torch.Tensor:
    layer: int | None = None
    name = parameter
    if parameter.startswith("decoder.layers."):
        number, part = parameter.removeprefix("decoder.layers.").split(".", 1)
        layer, name = int(number), f"decoder.layers.{_LAYER_NAMES[part]}"
    if name not in stored:
        raise UserError(f"checkpoint: {stored.folder} holds no {name}; it is damaged or not of this model")
    shape = stored.shape(name)
    fits = shape == wanted if layer is None else len(shape) == len(wanted) + 1 and shape[1:] == wanted and layer < shape[0]
    if not fits:
        raise UserError(f"checkpoint: {stored.folder}: {name} has shape {list(shape)}, the model's config asks for {list(wanted)} a layer")
    return stored.read(name, layer)
