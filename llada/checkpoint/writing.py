"""Canonical weights as the model folder of a checkpoint, written without the training engine.

The folder has the same tensor names as a run's own checkpoint (see llada.checkpoint.reading) but no
masters and no moments, so every layout reads it. The model is never in memory as a whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from llada.checkpoint.canonical import stored_name
from llada.config.sections import ModelSection
from llada.files import prefetch
from llada.model import weights

BLOCK_ELEMENTS = 1 << 24
"""Largest number of elements in a block, the unit in which weights are read and written."""

_METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""The folder's metadata.json: Megatron-Core's reader learns from it how the folder was written."""


@dataclass(frozen=True)
class _Rows:
    """Rows `first` to `last` (exclusive) of a Megatron parameter: one block of the checkpoint."""

    parameter: str
    first: int
    last: int


class _Planner(SavePlanner):
    """Plans the blocks of a model, and reads each only when it is about to be written."""

    def __init__(self, source: weights.Weights, model: ModelSection, dtype: torch.dtype) -> None:
        self._source = source
        self._model = model
        self._dtype = dtype
        self._rows_of: dict[MetadataIndex, _Rows] = {}

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        return

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for name in weights.parameter_names(self._model):
            items += self._plan_parameter(name)
        # The writer asks for the blocks in the order of the plan, so the next ones can be read
        # while it writes.
        self._blocks = prefetch(partial(self._read_block, index) for index in self._rows_of)
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        index, rows = next(self._blocks)
        requested = MetadataIndex(write_item.index.fqn, write_item.index.offset)
        assert index == requested and write_item.tensor_data is not None
        return rows.view(write_item.tensor_data.chunk.sizes)

    def _read_block(self, index: MetadataIndex) -> tuple[MetadataIndex, torch.Tensor]:
        rows = self._rows_of[index]
        values = weights.parameter_rows(
            self._model, self._source, rows.parameter, rows.first, rows.last
        )
        return index, values.to(self._dtype)

    def _plan_parameter(self, parameter: str) -> list[WriteItem]:
        """Cut a Megatron parameter into blocks of whole rows, and say where each is stored."""
        name, layer = stored_name(parameter)
        shape = weights.parameter_shape(self._model, parameter)
        # A layer's parameter is stored as one element along axis 0 of a stacked tensor.
        layer_offset: tuple[int, ...] = ()
        layer_size: tuple[int, ...] = ()
        stored_shape = shape
        if layer is not None:
            layer_offset = (layer,)
            layer_size = (1,)
            stored_shape = (self._model.num_layers, *shape)
        # A piece consists of whole rows, so it starts at column 0.
        no_columns = (0,) * (len(shape) - 1)
        items = []
        for first, last in weights.row_blocks(shape, BLOCK_ELEMENTS):
            offsets = torch.Size((*layer_offset, first, *no_columns))
            sizes = torch.Size((*layer_size, last - first, *shape[1:]))
            index = MetadataIndex(name, offsets)
            self._rows_of[index] = _Rows(parameter, first, last)
            data = TensorWriteData(
                ChunkStorageMetadata(offsets, sizes),
                TensorProperties(dtype=self._dtype),
                torch.Size(stored_shape),
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items


class _Writer(dcp.FileSystemWriter):
    """Leaves out the path and the random number that torch puts into the metadata.

    So the same model gives the same bytes.
    """

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()


def write_model(
    folder: Path, source: weights.Weights, model: ModelSection, dtype: torch.dtype
) -> None:
    """Write a model folder; takes a few hundred MB of memory whatever the model's size.

    Args:
        folder: exists and is empty.
        source: the canonical weights.
        model: their shape.
        dtype: storage dtype.
    """
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True)
    dcp.save({}, storage_writer=writer, planner=_Planner(source, model, dtype), no_dist=True)
    # What Megatron-Core's reader expects beside the tensors: objects that are no tensors (none),
    # and the kind of checkpoint.
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_METADATA_JSON), encoding="utf-8")
