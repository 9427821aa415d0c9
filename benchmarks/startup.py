"""Seconds from the command to the first finished step, in one run on one machine.

    python benchmarks/startup.py

Starts `llada pretrain` for one step on a small corpus of random text, several times, in turn with a
process that only imports torch and Megatron-Core, which is the least that any such run needs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

LLADA = [sys.executable, "-m", "llada"]
CONFIG = {
    "precision": "fp32",
    "run": {"dir": "run"},
    "train": {"steps": 1},
    "batch": {"global": 4, "micro": 4},
    "data": {"sequence_length": 64, "mixture": [{"path": "corpus"}]},
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "vocab_size": 512,
    },
    "schedule": {"stages": [{"shape": "constant", "start": 1e-4}]},
    "checkpoint": {"every": 100},
}


def prepare(folder: Path) -> dict[str, str]:
    """A corpus and a config; the environment to run in."""
    words = [f"word{i}" for i in range(300)]
    rng = random.Random(0)
    (folder / "text.txt").write_text(
        "\n\n".join(" ".join(rng.choices(words, k=200)) for _ in range(200))
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONWARNINGS": "ignore",
    }
    for command in (
        [
            "data",
            "tokenizer",
            "train",
            "--input",
            "text.txt",
            "--vocab-size",
            "512",
            "--output",
            "tokenizer",
        ],
        [
            "data",
            "prepare",
            "--input",
            "text.txt",
            "--tokenizer",
            "tokenizer",
            "--output",
            "corpus",
            "--validation-fraction",
            "0",
        ],
    ):
        subprocess.run(
            [*LLADA, *command], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
        )
    return environment


def first_step(folder: Path, environment: dict[str, str], number: int) -> float:
    """Seconds until metrics.jsonl has its first line."""
    config = folder / f"{number}.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "run": {"dir": f"run{number}"}}))
    metrics = folder / f"run{number}" / "metrics.jsonl"
    start = time.perf_counter()
    process = subprocess.Popen(
        [*LLADA, "pretrain", config.name], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll():
            raise RuntimeError(f"llada pretrain: exit {process.returncode}")
        time.sleep(0.01)
    took = time.perf_counter() - start
    process.wait()
    return took


def imports(environment: dict[str, str]) -> float:
    """Seconds of a process that imports what the engine stands on."""
    start = time.perf_counter()
    code = (
        "from llada.engine import cpu; cpu.before_import(); import megatron.core.optimizer,"
        " megatron.core.models.gpt"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = prepare(folder)
        rounds = [
            (first_step(folder, environment, number), imports(environment))
            for number in range(args.rounds + 1)
        ][1:]
    ours, floor = (statistics.median(values) for values in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    print(
        json.dumps(
            {
                "first_step_seconds": round(ours, 2),
                "imports_seconds": round(floor, 2),
                "ratio": round(ratio, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
