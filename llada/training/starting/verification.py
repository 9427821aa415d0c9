"""Verification of a checkpoint by all ranks together."""

from __future__ import annotations

from pathlib import Path

from llada.checkpoint.verification import verify_checkpoint
from llada.config import RunConfig
from llada.engine.layout import gather_world
from llada.process_rank import world_from_environment


def verify_on_all_ranks(config: RunConfig, folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint, the same on every rank; collective.

    Every rank reads its share of the files. Without `checkpoint.verify` none is read.
    """
    if not config.checkpoint.verify:
        return []
    process = world_from_environment()
    problems = []
    for share in gather_world(verify_checkpoint(folder, process.rank, process.world_size)):
        problems += share
    return problems
