"""Writing canonical weights as the model folder of a checkpoint, without the training engine and
without holding the model in memory.

The same names and pieces as a run's own checkpoints (see llada.checkpoint.reading), without masters
and moments: every layout reads it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
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

from llada.checkpoint.reading import stored_name
from llada.config.sections import ModelSection
from llada.files import prefetch
from llada.model import weights

# What Megatron-Core's reader asks of a folder besides the tensors: the kind of checkpoint, and what
# is not a tensor (here nothing).
_KIND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Part:
    """Some rows of a Megatron parameter: one piece of the checkpoint."""

    parameter: str
    first: int
    last: int


PIECE_ELEMENTS = 1 << 24
"""Elements of a piece at most."""


class _Planner(SavePlanner):
    """Plans the pieces of a model and reads each only when its turn to be written comes."""

    def __init__(self, source: weights.Weights, model: ModelSection, dtype: torch.dtype) -> None:
        self._source, self._model, self._dtype = source, model, dtype
        self._parts: dict[MetadataIndex, _Part] = {}

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        return

    def create_local_plan(self) -> SavePlan:
        plan = SavePlan(
            [item for name in weights.parameter_names(self._model) for item in self._items(name)]
        )
        # the writer asks in the order of the plan
        self._read = prefetch(partial(self._rows, index) for index in self._parts)
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        index, rows = next(self._read)
        assert write_item.tensor_data is not None and index == MetadataIndex(
            write_item.index.fqn, write_item.index.offset
        )
        return rows.view(write_item.tensor_data.chunk.sizes)

    def _rows(self, index: MetadataIndex) -> tuple[MetadataIndex, torch.Tensor]:
        part = self._parts[index]
        return index, weights.parameter_rows(
            self._model, self._source, part.parameter, part.first, part.last
        ).to(self._dtype)

    def _items(self, parameter: str) -> list[WriteItem]:
        name, layer = stored_name(parameter)
        shape = weights.parameter_shape(self._model, parameter)
        size = shape if layer is None else (self._model.num_layers, *shape)
        items = []
        for first, last in weights.row_blocks(shape, PIECE_ELEMENTS):
            corner, sizes = (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
            if layer is not None:
                corner, sizes = (layer, *corner), (1, *sizes)
            index = MetadataIndex(name, torch.Size(corner))
            self._parts[index] = _Part(parameter, first, last)
            chunk = ChunkStorageMetadata(torch.Size(corner), torch.Size(sizes))
            data = TensorWriteData(chunk, TensorProperties(dtype=self._dtype), torch.Size(size))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items


class _Writer(dcp.FileSystemWriter):
    """Without the path and the random number that torch puts into the metadata: the same model
    gives the same bytes.
    """

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()


def write_model(
    folder: Path, source: weights.Weights, model: ModelSection, dtype: torch.dtype
) -> None:
    """Write a model folder into an existing empty `folder`; a few hundred MB of memory whatever the
    model's size.
    """
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True)
    dcp.save({}, storage_writer=writer, planner=_Planner(source, model, dtype), no_dist=True)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_KIND), encoding="utf-8")
