"""Measure the conversion of a checkpoint from and to a Hugging Face folder, on one machine.

    python benchmarks/convert.py
    python benchmarks/convert.py --model llada_8b --layers 8

Writes a folder with random bf16 weights in the shape of a shipped config. Runs `llada convert
from-hf` and `llada convert to-hf` on it, each in its own process, alternately with a copy of the
same bytes with fsync. With --layers the model has fewer layers, like a pipeline stage that also
holds embedding and head.

Prints seconds, rates and their ratios to the copy, start-up included; the peak memory of each
process, and its limit, the largest tensor plus 2 GB. The folder that comes back is compared bit for
bit.
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

import torch

from llada.checkpoint.format import TrainedConfig
from llada.config.sections import ModelSection
from llada.hf.exporting import model_config
from llada.hf.tensor_files import total_bytes, write_safetensors
from llada.model.weights import canonical_shapes, num_parameters
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from llada.training.configure import load_config

ROOT = Path(__file__).resolve().parents[1]


class RandomWeights:
    """Random weights of a model, generated when they are read (`llada.model.weights.Weights`)."""

    def __init__(self, model: ModelSection) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = canonical_shapes(model)
        self._generator = torch.Generator().manual_seed(0)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        bits = torch.empty((last - first, *self.shapes[name][1:]), dtype=torch.int16)
        # Bit patterns below 16384 (0x4000) are the bf16 numbers from 0 to 2.
        return bits.random_(0, 16384, generator=self._generator).view(torch.bfloat16)


def make_folder(folder: Path, model: ModelSection) -> None:
    """Write a published folder of random weights, with a small tokenizer."""
    folder.mkdir()
    tokenizer: Tokenizer = train_byte_level_bpe(iter(["a few bytes"]), 262)
    tokenizer.save(folder)
    config = model_config(TrainedConfig(model, "bf16", 4096), tokenizer, "bf16")
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder, RandomWeights(model), torch.bfloat16, 5 * 10**9)


def run_llada(*arguments: str) -> tuple[float, float]:
    """Run a `llada` command; return its seconds and its peak memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "llada", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    # wait4 returns the resources that this one process used; ru_maxrss is in KiB.
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"llada {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def copy_weights(source: Path, target: Path) -> float:
    """Copy a folder's weights with fsync; return the seconds. The copy is removed again."""
    target.mkdir()
    start = time.perf_counter()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    took = time.perf_counter() - start
    shutil.rmtree(target)
    return took


def same_weights(one: Path, other: Path) -> bool:
    """Whether the weight files of `one` are the same in `other`, byte for byte."""
    names = [path.name for path in one.glob("*.safetensors")]
    equal, _, _ = filecmp.cmpfiles(one, other, names, shallow=False)
    return equal == names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="llada_1b", help="folder in configs/ that has a pretrain.yaml"
    )
    parser.add_argument("--layers", type=int, help="use fewer layers than the model has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    overrides = [] if args.layers is None else [f"model.num_layers={args.layers}"]
    model = load_config(ROOT / "configs" / args.model / "pretrain.yaml", overrides).model
    num_bytes = total_bytes(canonical_shapes(model), torch.bfloat16)
    largest_tensor = model.vocab_size * model.hidden_size * 2  # the embedding, 2 bytes an element
    seconds: dict[str, list[float]] = {"copy": [], "from-hf": [], "to-hf": []}
    memory = {"from-hf": 0.0, "to-hf": 0.0}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name) / "folder"
        checkpoint = Path(name) / "checkpoint"
        back = Path(name) / "back"
        make_folder(folder, model)
        # Each round converts there and back, next to a copy of the same bytes.
        for _ in range(args.rounds):
            seconds["copy"].append(copy_weights(folder, Path(name) / "copy"))
            for command, source, target in (
                ("from-hf", folder, checkpoint),
                ("to-hf", checkpoint, back),
            ):
                took, peak = run_llada("convert", command, str(source), str(target))
                seconds[command].append(took)
                memory[command] = max(memory[command], peak)
            same = same_weights(folder, back)
            shutil.rmtree(checkpoint)
            shutil.rmtree(back)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "parameters": num_parameters(model),
        "gigabytes": round(num_bytes / 1e9, 3),
        "seconds": {name: round(value, 2) for name, value in medians.items()},
        "mb_per_second": {name: round(num_bytes / value / 1e6) for name, value in medians.items()},
        "over_copy": {name: round(medians["copy"] / medians[name], 3) for name in memory},
        "peak_memory_gb": {name: round(value, 3) for name, value in memory.items()},
        "allowed_memory_gb": round(largest_tensor / 1e9 + 2, 3),
        "same_bits": same,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
