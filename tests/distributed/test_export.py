"""Checkpoints of every kind of layout, read without the training engine; and folders that others
wrote, loaded on every layout.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llada.checkpoint.canonical import CheckpointWeights, all_rows
from llada.checkpoint.format import CheckpointState, seal_checkpoint
from llada.checkpoint.reading import StoredTensors
from llada.config import dump_config
from llada.config.sections import ModelSection
from llada.engine.megatron import MegatronEngine
from llada.files import read_files
from llada.hf.folder import open_folder
from llada.hf.importing import from_hf
from llada.hf.modeling_llada import LLaDAModelLM
from llada.model import weights
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from tests import processes
from tests.distributed.layouts import LAYOUTS as MATRIX
from tests.distributed.pool import RankPool
from tests.engine.saves import save
from tests.engine.support import small_config, step_batches
from tests.hf.folders import published_config, published_tensors
from tests.model.assembly import gather
from tests.model.oracle import Oracle

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "DP4": ({}, {}, "fp32"),
    "TP2+SP x PP2": ({"tensor": 2, "sequence": True, "pipeline": 2}, {}, "fp32"),
    "TP2 x DP2, bf16": ({"tensor": 2}, {}, "bf16"),
    "PP2 x VP2 x DP2": ({"pipeline": 2, "virtual_pipeline": 2}, {}, "fp32"),
    "tied head, TP2 x PP2": ({"tensor": 2, "pipeline": 2}, {"tie_embeddings": True}, "fp32"),
    "TP4, all heads": ({"tensor": 4}, {"num_query_groups": None}, "fp32"),
}


def save_on_ranks(
    parallel: dict[str, Any], model: dict[str, Any], precision: str, folder: Path
) -> Any:
    """One step, so that norms are no longer ones; then a save. This rank's weights."""
    config = small_config(model, {**parallel}, precision=precision, batch={"global": 8, "micro": 1})
    engine = MegatronEngine(config)
    try:
        own_rank = engine.parallel_rank
        every = step_batches(config, 0)
        engine.train_step(every[own_rank.data_rank :: own_rank.data_size], 1e-2)
        save(engine, folder)
        return {
            n: p.detach().clone() for n, p in engine.parameters().items()
        }, *engine._tensor_rank_and_size()
    finally:
        engine.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stored_weights_are_the_ranks_weights(
    layout: str, pool: RankPool, tmp_path: Path
) -> None:
    parallel, model, precision = LAYOUTS[layout]
    folder = tmp_path / "model"
    folder.mkdir()
    expected = gather(
        small_config(model).model, pool.run(save_on_ranks, parallel, model, precision, folder)
    )
    config = small_config(model)
    stored = CheckpointWeights(StoredTensors(folder), config.model)
    tensors = {name: all_rows(stored, name) for name in stored.shapes}
    assert list(tensors) == list(weights.canonical_shapes(config.model))
    for name, value in tensors.items():
        assert value.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert torch.equal(value, expected[name]), name
    norms = torch.cat([value.float() for name, value in tensors.items() if value.dim() == 1])
    assert (norms != 1).float().mean() > 0.9


# -- a checkpoint of many ranks in transformers ----------------------------------------------------


def test_a_checkpoint_of_tp2_pp2_converts_on_one_process_and_has_the_oracles_logits(
    pool: RankPool, tmp_path: Path
) -> None:
    """The weights of the ranks after a step, in the oracle; and their checkpoint, converted and
    read by the exported model's code. tests/hf/test_convert.py reads a folder without this package.
    """
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": 384}
    run = tmp_path / "run" / "checkpoints" / "step_00000001"
    (run / "model").mkdir(parents=True)
    ranks = pool.run(
        save_on_ranks, {"tensor": 2, "sequence": True, "pipeline": 2}, sizes, "fp32", run / "model"
    )
    config = small_config(sizes)
    tokenizer.save(tmp_path / "tokenizer")
    state = CheckpointState(1, 8, 256, "", dump_config(config), {}, [], [])
    seal_checkpoint(run, state, read_files(tmp_path / "tokenizer"), {})
    convert = ("-m", "llada", "convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out"))
    environment = {**os.environ, "PYTHONPATH": str(processes.ROOT)}
    converted = processes.start(*convert, cwd=tmp_path, env=environment, stdout=None, stderr=None)
    assert converted.wait(600) == 0
    ids = torch.randint(0, 384, (2, 32), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = LLaDAModelLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    expected = Oracle(config.model, gather(config.model, ranks))(ids, torch.zeros_like(ids))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def byte_tokenizer() -> Tokenizer:
    """The smallest of ours: bytes and special tokens."""
    return train_byte_level_bpe(iter(["a few bytes"]), 262)


# -- what others wrote, on every layout ------------------------------------------------------------

FAST = ("TP2 x PP2 x DP2, everything on", "TP2+SP x CP2 x DP2", "tied head, PP2 x VP2 x DP4")


def pass_through(
    parallel: dict[str, Any],
    model: dict[str, Any],
    precision: str,
    sources: tuple[Path, Path],
    outs: tuple[Path, Path],
) -> None:
    """Load a Hugging Face folder, save; load an imported checkpoint, save."""
    engine = MegatronEngine(
        small_config(model, parallel, precision=precision, batch={"global": 8, "micro": 1})
    )
    try:
        engine.load_canonical(open_folder(sources[0]).weights)
        save(engine, outs[0])
        engine.load(sources[1] / "model", optimizer=False)
        save(engine, outs[1])
    finally:
        engine.close()


def written_folder(
    path: Path, model: ModelSection, tokenizer: Tokenizer, seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    tokenizer.save(path)
    tensors = {name: tensor.to(dtype) for name, tensor in published_tensors(model, seed).items()}
    (path / "config.json").write_text(json.dumps(published_config(model, tokenizer)))
    save_file(tensors, path / "model.safetensors")
    return tensors


PASSED = [*((name, "fp32") for name in MATRIX), *((name, "bf16") for name in FAST)]


@pytest.mark.parametrize(
    ("layout", "precision"),
    [pytest.param(*one, marks=() if one[0] in FAST else pytest.mark.slow) for one in PASSED],
)
def test_folders_and_imports_pass_through_every_layout_bit_for_bit(
    layout: str, precision: str, pool: RankPool, tmp_path: Path
) -> None:
    """Also in bf16 every digit of an fp32 folder is kept, in the masters."""
    parallel, sizes = MATRIX[layout]
    model = small_config({**sizes, "vocab_size": 384}).model
    expected = [
        written_folder(tmp_path / f"folder{i}", model, byte_tokenizer(), i, torch.float32)
        for i in range(2)
    ]
    from_hf(tmp_path / "folder1", tmp_path / "imported")
    outs = tmp_path / "out0", tmp_path / "out1"
    for out in outs:
        out.mkdir()
    sources = tmp_path / "folder0", tmp_path / "imported"
    pool.run(pass_through, parallel, {**sizes, "vocab_size": 384}, precision, sources, outs)
    for out, tensors in zip(outs, expected, strict=True):
        for masters in (False, True):
            reopened = CheckpointWeights(StoredTensors(out), model, masters)
            assert reopened.shapes.keys() == tensors.keys()
            for name, tensor in tensors.items():
                kept = tensor if masters or precision == "fp32" else tensor.bfloat16()
                assert torch.equal(all_rows(reopened, name), kept), (out.name, masters, name)
