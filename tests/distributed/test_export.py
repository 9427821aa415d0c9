"""Checkpoints of every kind of layout, read without the training engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llada.engine.megatron import MegatronEngine
from llada.model import weights
from llada.model.stored import CheckpointWeights, StoredTensors, all_rows
from tests.distributed.pool import RankPool
from tests.engine.support import small_config, step_batches

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "DP4": ({}, {}, "fp32"),
    "TP2+SP x PP2": ({"tensor": 2, "sequence": True, "pipeline": 2}, {}, "fp32"),
    "TP2 x DP2, bf16": ({"tensor": 2}, {}, "bf16"),
    "PP2 x VP2 x DP2": ({"pipeline": 2, "virtual_pipeline": 2}, {}, "fp32"),
    "tied head, TP2 x PP2": ({"tensor": 2, "pipeline": 2}, {"tie_embeddings": True}, "fp32"),
    "TP4, all heads": ({"tensor": 4}, {"num_query_groups": None}, "fp32"),
}


def save_on_ranks(parallel: dict[str, Any], model: dict[str, Any], precision: str, folder: Path) -> Any:
    """One step, so that norms are no longer ones; then a save. This rank's weights."""
    config = small_config(model, {**parallel}, precision=precision, batch={"global": 8, "micro": 1})
    engine = MegatronEngine(config)
    try:
        place = engine.place
        every = step_batches(config, 0)
        engine.train_step(every[place.data_rank :: place.data_size], 1e-2)
        engine.save(folder)
        return {n: p.detach().clone() for n, p in engine.parameters().items()}, *engine._tensor_place()
    finally:
        engine.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stored_weights_are_the_ranks_weights(layout: str, pool: RankPool, tmp_path: Path) -> None:
    parallel, model, precision = LAYOUTS[layout]
    folder = tmp_path / "model"
    folder.mkdir()
    wanted = weights.gather(small_config(model).model, pool.run(save_on_ranks, parallel, model, precision, folder))
    config = small_config(model)
    stored = CheckpointWeights(StoredTensors(folder), config.model)
    found = {name: all_rows(stored, name) for name in stored.shapes}
    assert list(found) == list(weights.canonical_shapes(config.model))
    for name, value in found.items():
        assert value.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert torch.equal(value, wanted[name]), name
    norms = torch.cat([value.float() for name, value in found.items() if value.dim() == 1])
    assert (norms != 1).float().mean() > 0.9
