"""Measure the time from the command to the first finished step, in one run on one machine.

    python benchmarks/startup.py

Starts `llada pretrain` for one step on a small corpus of random text, several times, alternately
with a process that only imports torch and Megatron-Core: the least that any such run needs.
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
TRAIN_TOKENIZER = "data tokenizer train --input text.txt --vocab-size 512 --output tokenizer"
PREPARE_CORPUS = (
    "data prepare --input text.txt --tokenizer tokenizer --output corpus --validation-fraction 0"
)
# The imports of the engine.
IMPORTS = (
    "from llada.engine import cpu; cpu.before_import();"
    " import megatron.core.optimizer, megatron.core.models.gpt"
)


def prepare(folder: Path) -> dict[str, str]:
    """Make a corpus; return the environment for the commands."""
    words = [f"word{i}" for i in range(300)]
    rng = random.Random(0)
    paragraphs = [" ".join(rng.choices(words, k=200)) for _ in range(200)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONWARNINGS": "ignore",
    }
    for command in (TRAIN_TOKENIZER, PREPARE_CORPUS):
        subprocess.run(
            [*LLADA, *command.split()],
            cwd=folder,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return environment


def time_first_step(folder: Path, environment: dict[str, str], number: int) -> float:
    """Start run `number`; return the seconds until metrics.jsonl has its first line."""
    config = folder / f"{number}.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "run": {"dir": f"run{number}"}}))
    metrics = folder / f"run{number}" / "metrics.jsonl"
    start = time.perf_counter()
    process = subprocess.Popen(
        [*LLADA, "pretrain", config.name], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    # The file appears with the first line; 10 ms are little beside the seconds of a start.
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll():
            raise RuntimeError(f"llada pretrain: exit {process.returncode}")
        time.sleep(0.01)
    took = time.perf_counter() - start
    process.wait()
    return took


def time_imports(environment: dict[str, str]) -> float:
    """Seconds of a process that only imports."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], env=environment, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    first_steps = []
    imports = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = prepare(folder)
        for number in range(args.rounds + 1):
            first_steps.append(time_first_step(folder, environment, number))
            imports.append(time_imports(environment))
    # The first round reads the files into the page cache.
    del first_steps[0], imports[0]
    ratios = [step / floor for step, floor in zip(first_steps, imports, strict=True)]
    result = {
        "first_step_seconds": round(statistics.median(first_steps), 2),
        "imports_seconds": round(statistics.median(imports), 2),
        "ratio": round(statistics.median(ratios), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
