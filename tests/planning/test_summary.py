"""`llada config`: parameters, FLOPs, state and checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from llada.checkpoint.names import MARKER, checkpoint_name, committed_checkpoints
from llada.checkpoint.retention import prune_checkpoints
from llada.cli import app
from llada.config import build_config, dump_config
from llada.planning.summary import checkpoint_volume
from llada.training.configure import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("keep_last", "keep_every"), [(None, None), (None, 6), (2, None), (2, 6), (3, 4), (99, None)]
)
@pytest.mark.parametrize("steps", [1, 20, 24, 25])
def test_the_number_of_checkpoints_is_what_pruning_leaves(
    keep_last: int | None, keep_every: int | None, steps: int, tmp_path: Path
) -> None:
    raw = dump_config(load_config(CONFIGS / "demo" / "pretrain.yaml"))
    raw["train"]["steps"] = steps
    raw["checkpoint"] |= {"every": 4, "keep_last": keep_last, "keep_every": keep_every}
    for step in sorted({*range(4, steps + 1, 4), steps}):
        folder = tmp_path / checkpoint_name(step)
        folder.mkdir()
        (folder / MARKER).touch()
        prune_checkpoints(tmp_path, keep_last, keep_every)
    assert checkpoint_volume(build_config(raw)).kept == len(committed_checkpoints(tmp_path))


@pytest.mark.parametrize(
    ("name", "most"),
    [("llada_8b/pretrain", 1.5e12), ("llada_8b/sft", 1e12), ("llada_1b/pretrain", 1.5e11)],
)
def test_the_published_models_do_not_fill_a_disk(name: str, most: float) -> None:
    """The 8B run kept 438 checkpoints, 49 TB."""
    volume = checkpoint_volume(load_config(CONFIGS / f"{name}.yaml"))
    assert volume.bytes_each * volume.kept < most


def test_the_command_prints_the_settings_and_a_summary() -> None:
    path = CONFIGS / "llada_8b" / "pretrain.yaml"
    done = CliRunner().invoke(app, ["config", str(path)])
    assert yaml.safe_load(done.stdout) == dump_config(load_config(path))
    assert "# parameters: 8,015,581,184, 6,979,588,096 without embedding and head\n" in done.stdout
    assert (
        "# checkpoints: 112 GB each, 11 kept at the end, 1.23 TB in total (every 1,000 steps)\n"
        in done.stdout
    )
    assert "# FLOPs: 4.99e+10 per token" in done.stdout
    assert (
        "# state: 48.1 GB of weights and gradients on each replica, 96.2 GB of optimizer state"
        " divided over all\n" in done.stdout
    )
