"""The optimizer's settings, and what a checkpoint hands on."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llada.checkpoint.reading import StoredTensors
from llada.engine.megatron import MegatronEngine
from llada.planning.summary import checkpoint_volume
from tests.engine.saves import save
from tests.engine.support import OracleTrainer, canonical, small_config, step_batches

OTHER = {"beta1": 0.6, "beta2": 0.7, "eps": 1e-3, "weight_decay": 3.0, "clip": 0.05}
RATES = [1e-3] * 4


def trained(config: Any, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    trainer = OracleTrainer(config, start)
    for step, rate in enumerate(RATES):
        trainer.step(step_batches(config, step), rate)
    return {name: value.detach().clone() for name, value in trainer.oracle.w.items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Mean difference of two sets of weights, in learning rates."""
    flat = torch.cat([(one[name] - other[name]).flatten().abs() for name in one])
    return float(flat.mean() / sum(RATES))


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_of_the_optimizer_is_used(name: str) -> None:
    config = small_config(optimizer={name: OTHER[name]})
    engine = MegatronEngine(config)
    try:
        start = canonical(engine)
        for step, rate in enumerate(RATES):
            engine.train_step(step_batches(config, step), rate)
        after = canonical(engine)
    finally:
        engine.close()
    right, wrong = (
        distance(after, trained(config, start)),
        distance(after, trained(small_config(), start)),
    )
    assert right < 1e-3
    assert wrong > 20 * right


def masters(engine: MegatronEngine) -> list[torch.Tensor]:
    return [p.detach().clone() for group in engine.optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weights_alone_are_the_fp32_masters_and_the_optimizer_starts_afresh(
    precision: str, tmp_path: Path
) -> None:
    """A run in bf16 keeps its small updates in the masters: a run that starts from its checkpoint
    must not lose them.
    """
    source = MegatronEngine(small_config(precision="bf16"))
    for step in range(3):
        source.train_step(step_batches(source.config, step), 1e-4)
    save(source, tmp_path)
    expected = torch.cat([p.flatten() for p in masters(source)])
    source.close()
    engine = MegatronEngine(small_config(precision=precision, optimizer={"beta1": 0.5}, seed=99))
    try:
        engine.load(tmp_path, optimizer=False)
        values = torch.cat([p.flatten() for p in masters(engine)])
        assert (expected != expected.bfloat16().float()).any()
        assert torch.equal(values.sort().values, expected.sort().values)
        assert {group["betas"] for group in engine.optimizer.param_groups} == {(0.5, 0.95)}
        # in fp32 the oracle follows exactly: no moments, a first step's bias correction
        if precision == "fp32":
            trainer = OracleTrainer(engine.config, canonical(engine))
            for step in range(3):
                batches = step_batches(engine.config, 10 + step)
                loss, _, _ = trainer.step(batches, 1e-3)
                assert engine.train_step(batches, 1e-3).loss == pytest.approx(loss, rel=1e-6)
    finally:
        engine.close()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_save_has_the_size_that_the_plan_says(precision: str, tmp_path: Path) -> None:
    config = small_config(precision=precision)
    engine = MegatronEngine(config)
    save(engine, tmp_path)
    engine.close()
    stored = StoredTensors(tmp_path)
    sizes = [math.prod(stored.shape(n)) * stored.dtype(n).itemsize for n in stored.names()]
    assert sum(sizes) == checkpoint_volume(config).bytes_each


def test_changed_settings_of_the_optimizer_hold_after_a_resume(tmp_path: Path) -> None:
    first = MegatronEngine(small_config())
    first.train_step(step_batches(first.config, 0), 1e-3)
    save(first, tmp_path)
    first.close()
    engine = MegatronEngine(small_config(optimizer={"beta2": 0.8, "eps": 1e-6}))
    try:
        engine.load(tmp_path)
        assert {(group["betas"], group["eps"]) for group in engine.optimizer.param_groups} == {
            ((0.9, 0.8), 1e-6)
        }
        assert {
            int(moments["step"]) for moments in engine._optimizers()[0].optimizer.state.values()
        } == {1}
        engine.train_step(step_batches(first.config, 1), 1e-3)
        assert {
            int(moments["step"]) for moments in engine._optimizers()[0].optimizer.state.values()
        } == {2}
    finally:
        engine.close()


def test_closed_engines_leave_no_threads(tmp_path: Path) -> None:
    """Every process group has threads; those of engines that are gone would take the processor in
    the end.
    """
    counts = []
    gc.disable()  # a collection by chance would hide the leak
    try:
        for number in range(5):
            engine = MegatronEngine(small_config())
            counts.append(len(os.listdir("/proc/self/task")))
            engine.train_step(step_batches(engine.config, 0), 1e-3)
            (tmp_path / str(number)).mkdir()
            save(engine, tmp_path / str(number))
            engine.load(tmp_path / str(number))
            engine.close()
            del engine
    finally:
        gc.enable()
    assert max(counts[2:]) <= counts[1]
