"""A small prepared corpus of real code, and runs of the command line on it."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_inputs
from data_tools.readers.report import Report
from llada.tokenizer import train_byte_level_bpe
from tests import processes
from tests.preparation import prepare

CONFIG: dict[str, Any] = {
    "seed": 5,
    "precision": "fp32",
    "run": {"dir": "run", "threads": 2},
    "train": {"steps": 12},
    "batch": {"global": 8, "micro": 4},
    "data": {
        "sequence_length": 64,
        "document_mask": True,
        "random_length_probability": 0.3,
        "mixture": [{"path": "corpus"}],
    },
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "vocab_size": 512,
    },
    "schedule": {"stages": [{"shape": "linear", "end": 1e-3, "steps": 10}, {"shape": "constant"}]},
    "validation": {"every": 4, "windows": 32},
    "checkpoint": {"every": 4},
    "logging": {"every": 1},
}
MEASURED = (
    "seconds",
    "tokens_per_second",
    "mfu",
    "mfu_full_length",
    "memory_gb",
    "checkpoint_blocked_seconds",
)
"""Fields of metrics.jsonl that are measured, not computed."""

FOREIGN = ("No CUDA runtime is found",)
"""Beginnings of lines on standard error that are not ours. The CUDA build of torch prints this one
when it is imported without a GPU.
"""
LIMIT = 600
"""Seconds after which a command counts as hung: many times what it takes on an idle machine."""


@dataclass(frozen=True)
class Workplace:
    """A folder with a corpus, in which commands run."""

    folder: Path

    def config(self, name: str = "run.yaml", **sections: Any) -> str:
        """Write CONFIG with some sections replaced; returns the name of the file."""
        (self.folder / name).write_text(yaml.safe_dump({**CONFIG, **sections}))
        return name

    def environment(self) -> dict[str, str]:
        root = str(Path(__file__).parents[1])
        return {**os.environ, "PYTHONPATH": root, "WANDB_MODE": "offline"}

    def start(
        self, *arguments: str, command: tuple[str, ...] = ("-m", "llada"), fresh: bool = False
    ) -> processes.Process:
        """Start a command; `fresh` uses a new interpreter (tests/processes.py)."""
        return processes.start(
            *command, *arguments, cwd=self.folder, env=self.environment(), fresh=fresh
        )

    def run(
        self,
        *arguments: str,
        code: int = 0,
        command: tuple[str, ...] = ("-m", "llada"),
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and assert its exit code."""
        process = self.start(*arguments, command=command, fresh=fresh)
        out, error = process.communicate(timeout=LIMIT)
        assert process.returncode == code, (
            f"exit {process.returncode}\n{out[-2000:]}\n{error[-2000:]}"
        )
        error = "".join(
            line for line in error.splitlines(keepends=True) if not line.startswith(FOREIGN)
        )
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def lines(self, run: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without the fields that are measured."""
        raw = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in raw]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Corpora `corpus` and `other` with one tokenizer, and `whole`, a complete run of CONFIG."""
    folder = tmp_path_factory.mktemp("runs")
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer = train_byte_level_bpe(read_inputs([library / "json"], ReadOptions(), Report()), 512)
    tokenizer.save(folder / "tokenizer")
    prepare(
        [library / "json", library / "email"],
        folder / "tokenizer",
        folder / "corpus",
        validation_fraction=0.15,
    )
    prepare([library / "asyncio"], folder / "tokenizer", folder / "other", validation_fraction=0.0)
    workplace = Workplace(folder)
    workplace.config("whole.yaml", run={"dir": "whole", "threads": 2})
    # In a new interpreter: tests compare with it what forks compute.
    workplace.run("pretrain", "whole.yaml", fresh=True)
    return workplace
