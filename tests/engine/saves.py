"""Saves of an engine, as a run's checkpoints hold them under model/."""

from __future__ import annotations

from pathlib import Path

import torch

from llada.checkpoint.reading import StoredTensors
from llada.engine.megatron import MegatronEngine


def save(engine: MegatronEngine, folder: Path) -> None:
    """Write model and optimizer into an existing empty folder; return when it is complete."""
    pending = engine.start_save(folder)
    pending.wait()
    if pending.error is not None:
        raise pending.error
    pending.finish()


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a save whole, by name."""
    stored = StoredTensors(folder)
    return {name: stored.rows(name, 0, stored.shape(name)[0]) for name in stored.names()}
