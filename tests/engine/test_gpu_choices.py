"""What the engine chooses for GPUs, as far as a machine without one can tell."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from llada.engine import cpu, layout
from llada.engine.determinism import use_deterministic_algorithms
from llada.engine.megatron import MegatronEngine
from llada.engine.rank_batch import rank_batch
from llada.errors import UserError
from llada.model import attention
from llada.objectives import TOKENS
from tests.engine.support import small_config, step_batches


def test_an_importable_fused_adam_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Transformer Engine or Apex, Megatron-Core takes their Adam and hands it arguments that
    torch's does not know.
    """
    import megatron.core.optimizer as optimizer

    class FusedAdam:
        def __init__(self, params: object, adam_w_mode: bool) -> None:
            raise AssertionError("not torch's")

    monkeypatch.setattr(optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    cpu.after_import.__wrapped__()
    engine = MegatronEngine(small_config())
    try:
        assert engine.train_step(step_batches(engine.config, 0), 1e-3).applied
        assert isinstance(engine._optimizers()[0].optimizer, torch.optim.AdamW)
    finally:
        engine.close()


def test_exchanges_between_stages_do_not_wait_for_the_device() -> None:
    engine = MegatronEngine(small_config(), training=False)
    try:
        assert not engine.transformer_config.batch_p2p_sync
    finally:
        engine.close()


def test_more_ranks_than_gpus_are_refused() -> None:
    assert [layout._own_gpu(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert layout._own_gpu(3, 1) == 0  # each rank sees only its own
    with pytest.raises(
        UserError,
        match=r"local rank 4 has no GPU of its own, this machine shows 4; .*LLADA_DEVICE=cpu",
    ):
        layout._own_gpu(4, 4)


def test_ranks_that_see_the_same_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(into: list[str], own: str) -> None:
        into[:] = [own, "another node's GPU-1", own]

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-1", name="H100")
    )
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(UserError, match=r"ranks 0, 2 would share one GPU \(H100\)"):
        layout._refuse_shared_gpus()


def test_collectives_wait_twice_as_long_as_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its report names the ranks that hang; NCCL's own time-out names a collective."""
    from megatron.core import parallel_state

    given: dict[str, object] = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda *_, timeout, **__: given.update(world=timeout)
    )
    layout.join_world(hang_timeout_s=600)
    assert given["world"] == timedelta(seconds=1200)
    monkeypatch.setattr(
        parallel_state, "initialize_model_parallel", lambda **settings: given.update(settings)
    )
    monkeypatch.setattr(layout, "ParallelRank", lambda *_: None)
    for name in ("get_data_parallel_rank", "get_data_parallel_world_size"):
        monkeypatch.setattr(parallel_state, name, lambda: 0)
    for name in ("get_rank", "get_world_size"):
        monkeypatch.setattr(dist, name, lambda: 0)
    monkeypatch.setattr(
        "megatron.core.tensor_parallel.model_parallel_cuda_manual_seed", lambda seed: None
    )
    layout.start_model_parallel(small_config().parallel, hang_timeout_s=600)
    assert given["distributed_timeout_minutes"] == 20


def test_deterministic_runs_fix_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        use_deterministic_algorithms()
        assert torch.are_deterministic_algorithms_enabled()
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (
            ":4096:8",
            "Ring",
        )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_context_rank_gets_its_part_with_the_lengths_for_its_kernel(rank: int) -> None:
    batch = step_batches(small_config(), 0)[0]
    kernel = attention.Kernel("any", lambda *_: torch.empty(0), whole_rows=True)
    part = rank_batch(batch, rank, 4, kernel)
    first, length = 8 * rank, 8
    assert torch.equal(part.inputs, batch.inputs[:, first : first + length])
    assert torch.equal(part.positions, torch.arange(first, first + length))
    terms = batch.terms[TOKENS]
    expected = []
    for row, column, target, weight in zip(
        terms.rows.tolist(), terms.columns.tolist(), terms.targets, terms.weights, strict=True
    ):
        if first <= column < first + length:
            index = (column - first) * len(batch.inputs) + row
            expected.append((index, int(target), float(weight)))
    own = part.terms[TOKENS]
    got = zip(own.indices.tolist(), own.targets.tolist(), own.weights.tolist(), strict=True)
    assert list(got) == expected
    assert part.lengths is not None
    assert int(part.lengths.queries[-1]) == len(batch.inputs) * length
    assert int(part.lengths.keys[-1]) == batch.inputs.numel()
    assert rank_batch(batch, rank, 4, None).lengths is None
