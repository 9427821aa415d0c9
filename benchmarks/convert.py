"""What it costs to convert a checkpoint from and to a Hugging Face folder, in one run on one
machine.

    python benchmarks/convert.py
    python benchmarks/convert.py --model llada_8b --layers 8

Writes a folder with random bf16 weights in the shape of a shipped config (with fewer layers: as a
pipeline stage that also holds embedding and head), runs `llada convert from-hf` and `llada convert
to-hf` on it, each in a process of its own, and copies the same bytes with fsync in between.
Printed: seconds, bytes per second and their ratio to the copy, start-up included; the peak memory
of each process, and what it may be at most: the largest tensor and 2 GB. The folder that comes back
is compared bit for bit.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llada.checkpoint.format import TrainedConfig
from llada.config.sections import ModelSection
from llada.hf.exporting import model_config
from llada.hf.tensor_files import total_bytes, write_safetensors
from llada.model.weights import canonical_shapes, num_parameters
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from llada.training.configure import load_config

ROOT = Path(__file__).resolve().parents[1]


class Random:
    """Random weights of a model, made when they are asked for."""

    def __init__(self, model: ModelSection) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = canonical_shapes(model)
        self._draw = torch.Generator().manual_seed(0)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        values = torch.empty((last - first, *self.shapes[name][1:]), dtype=torch.int16)
        # any bits of a number from 0 to 2
        return values.random_(0, 16384, generator=self._draw).view(torch.bfloat16)


def make_folder(folder: Path, model: ModelSection) -> None:
    """A published folder of random weights, with a small tokenizer."""
    tokenizer: Tokenizer = train_byte_level_bpe(iter(["a few bytes"]), 262)
    tokenizer.save(folder)
    config = model_config(TrainedConfig(model, "bf16", 4096), tokenizer, "bf16")
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder, Random(model), torch.bfloat16, 5 * 10**9)


def run(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in GB of a `llada` command."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "llada", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"llada {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder's weights with fsync."""
    target.mkdir()
    start = time.perf_counter()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    took = time.perf_counter() - start
    shutil.rmtree(target)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="llada_1b", help="folder below configs/ with a pretrain.yaml"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", help="where to write; the system's temporary folder if left out"
    )
    args = parser.parse_args()
    overrides = [] if args.layers is None else [f"model.num_layers={args.layers}"]
    model = load_config(ROOT / "configs" / args.model / "pretrain.yaml", overrides).model
    size, largest = (
        total_bytes(canonical_shapes(model), torch.bfloat16),
        model.vocab_size * model.hidden_size * 2,
    )
    seconds: dict[str, list[float]] = {"copy": [], "from-hf": [], "to-hf": []}
    memory = {"from-hf": 0.0, "to-hf": 0.0}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        scratch = Path(name)
        (scratch / "folder").mkdir()
        make_folder(scratch / "folder", model)
        for _ in range(args.rounds):
            seconds["copy"].append(copy(scratch / "folder", scratch / "copy"))
            for command, source, target in (
                ("from-hf", "folder", "checkpoint"),
                ("to-hf", "checkpoint", "back"),
            ):
                took, peak = run("convert", command, str(scratch / source), str(scratch / target))
                seconds[command].append(took)
                memory[command] = max(memory[command], peak)
            files = [path.name for path in (scratch / "folder").glob("*.safetensors")]
            same = (
                filecmp.cmpfiles(scratch / "folder", scratch / "back", files, shallow=False)[0]
                == files
            )
            shutil.rmtree(scratch / "checkpoint")
            shutil.rmtree(scratch / "back")
    medians = {what: statistics.median(values) for what, values in seconds.items()}
    result: dict[str, Any] = {
        "parameters": num_parameters(model),
        "gigabytes": round(size / 1e9, 3),
        "seconds": {what: round(value, 2) for what, value in medians.items()},
        "mb_per_second": {what: round(size / value / 1e6) for what, value in medians.items()},
        "over_copy": {what: round(medians["copy"] / medians[what], 3) for what in memory},
        "peak_memory_gb": {what: round(value, 3) for what, value in memory.items()},
        "allowed_memory_gb": round(largest / 1e9 + 2, 3),
        "same_bits": same,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
