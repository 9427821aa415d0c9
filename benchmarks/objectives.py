"""Compare the objectives: the same model on the same tokens in the same order.

    llada demo          # prepares runs/demo/corpus
    python benchmarks/objectives.py

Each contender is `llada pretrain` of a config in configs/objectives, in a process of its own, one
after the other. Printed is a Markdown table: bits per byte of the held-out text at the end with the
standard error, the seconds of the training steps, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "objectives"
CONTENDERS: dict[str, tuple[str, list[str]]] = {
    "autoregressive": ("autoregressive", []),
    "masked": ("masked", []),
    "masked, `masking: fixed_count`": ("masked", ["objective.masking=fixed_count"]),
    "masked, `schedule: cosine`": ("masked", ["objective.schedule=cosine"]),
    "masked, `schedule: geometric`": ("masked", ["objective.schedule=geometric"]),
    "masked, `schedule: clipped`": ("masked", ["objective.schedule=clipped"]),
    "masked, `subs: true`": ("masked", ["objective.subs=true"]),
    "discrete_steps, `steps: 1000`": ("discrete_steps", []),
    "discrete_steps, `steps: 16`": ("discrete_steps", ["objective.steps=16"]),
}
"""What is printed -> a config, and settings that differ from it."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        bits: bits per byte of the held-out text after the last step.
        error: its standard error.
        seconds: of all training steps.
        memory_gb: peak resident memory of the process.
    """

    bits: float
    error: float
    seconds: float
    memory_gb: float


def run(config: str, settings: list[str], folder: Path, more: list[str]) -> Result:
    """Train a config in a process of its own, and read its metrics."""
    command = [sys.executable, "-m", "llada", "pretrain", str(CONFIGS / f"{config}.yaml")]
    process = subprocess.Popen(
        [*command, f"run.dir={folder}", "logging.every=1", *settings, *more],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{config}: the run exited with {process.returncode}")
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    last = [line for line in lines if "bits_per_byte" in line][-1]
    return Result(
        bits=last["bits_per_byte"],
        error=last["bits_per_byte_se"],
        seconds=sum(line["seconds"] for line in lines if "loss" in line),
        memory_gb=usage.ru_maxrss * 1024 / 1e9,
    )


def main() -> None:
    """Run all contenders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="*", help="settings of every run, as train.steps=100")
    arguments = parser.parse_args()
    print("| Objective | Bits per byte | Seconds | Memory |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (config, settings)) in enumerate(CONTENDERS.items()):
            result = run(config, settings, Path(scratch) / str(number), arguments.settings)
            print(
                f"| {name} | {result.bits:.3f} ± {result.error:.3f} | {result.seconds:.0f} |"
                f" {result.memory_gb:.2f} GB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
