"""What a config amounts to: parameters, FLOPs, state, checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from llada.checkpoint import format
from llada.cli import app
from llada.config import build_config, dump_config
from llada.files import readable_size
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
        folder = tmp_path / format.name(step)
        folder.mkdir()
        (folder / format.MARKER).touch()
        format.prune(tmp_path, keep_last, keep_every)
    assert checkpoint_volume(build_config(raw)).kept == len(format.committed(tmp_path))


@pytest.mark.parametrize(
    ("name", "most"),
    [("llada_8b/pretrain", 1.5e12), ("llada_8b/sft", 1e12), ("llada_1b/pretrain", 1.5e11)],
)
def test_the_published_models_do_not_fill_a_disk(name: str, most: float) -> None:
    """The 8B run kept 438 checkpoints, 49 TB."""
    volume = checkpoint_volume(load_config(CONFIGS / f"{name}.yaml"))
    assert volume.bytes_each * volume.kept < most


def test_the_command_prints_yaml_and_what_it_amounts_to() -> None:
    path = CONFIGS / "llada_8b" / "pretrain.yaml"
    done = CliRunner().invoke(app, ["config", str(path)])
    assert yaml.safe_load(done.stdout) == dump_config(load_config(path))
    assert (
        "# parameters: 8,015,581,184, of them 6,979,588,096 without embedding and head\n"
        in done.stdout
    )
    assert (
        "# checkpoints: 112 GB each, 11 kept at the end, 1.23 TB in all (every 1,000 steps)\n"
        in done.stdout
    )
    assert "# FLOPs: 4.99e+10 a token" in done.stdout
    assert (
        "# state: 48.1 GB of weights and gradients on each replica, 96.2 GB of optimizer state"
        " divided over all\n" in done.stdout
    )


def test_a_terminal_without_unicode_shows_escapes() -> None:
    code = "import sys, llada.cli as cli; cli.app = lambda **_: print('2.5 ± 0.1'); cli.main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2.5 \\xb1 0.1\n"


def test_sizes_in_words() -> None:
    assert [readable_size(n) for n in (0, 999, 999_600, 12_345, 1.12e11, 4.9e13, 1e20)] == [
        "0 bytes",
        "999 bytes",
        "1 MB",
        "12.3 kB",
        "112 GB",
        "49 TB",
        "1e+05 PB",
    ]
