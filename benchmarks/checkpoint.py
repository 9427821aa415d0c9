"""Measure the cost of a checkpoint, in one run on one machine.

    python benchmarks/checkpoint.py

Saves the state of a model (weights, moments) alternately in the background and in the foreground,
and copies the same bytes as plain files with fsync. Prints the seconds for which each kind of save
blocks training, the rate of a whole save with its checksums, and its ratio to the copy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from llada.config import RunConfig, build_config
from llada.engine.megatron import MegatronEngine
from llada.files import sync_tree


class SaveTimes(NamedTuple):
    """Seconds of one save, and the size of what it wrote.

    Attributes:
        start: Until `start_save` returned: what a background save blocks.
        whole: Until the save was complete: what a foreground save blocks.
        copy: Of a plain copy of the same files.
        num_bytes: Of the files.
    """

    start: float
    whole: float
    copy: float
    num_bytes: int


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", default=None, help="where to write (default: the system's temporary folder)"
    )
    return parser.parse_args()


def model_config(args: argparse.Namespace) -> RunConfig:
    """A run of a model of the given shape. Nothing is trained, so the rest is arbitrary."""
    return build_config(
        {
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
            "run": {"dir": "unused"},
            "train": {"steps": 1},
            "batch": {"global": 1, "micro": 1},
            "data": {"sequence_length": 128, "mixture": [{"path": "unused"}]},
            "model": {
                "num_layers": args.layers,
                "hidden_size": args.hidden_size,
                "num_attention_heads": args.hidden_size // 64,
                "ffn_hidden_size": 3 * args.hidden_size,
                "vocab_size": args.vocabulary,
            },
            "schedule": {"stages": [{"shape": "constant", "start": 1e-4}]},
        }
    )


def measure_save(engine: MegatronEngine, folder: Path, copy: Path) -> SaveTimes:
    """Save into `folder`, then copy it to `copy`. Both are removed again."""
    folder.mkdir()
    begun = time.perf_counter()
    pending = engine.start_save(folder)
    start = time.perf_counter() - begun
    pending.wait()
    if pending.error is not None:
        raise pending.error
    pending.finish()
    whole = time.perf_counter() - begun
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # The lower limit: the same bytes on the same disk, flushed like a checkpoint.
    begun = time.perf_counter()
    shutil.copytree(folder, copy)
    sync_tree(copy)
    copy_time = time.perf_counter() - begun
    shutil.rmtree(copy)
    shutil.rmtree(folder)
    return SaveTimes(start, whole, copy_time, num_bytes)


def main() -> None:
    args = parse_arguments()
    engine = MegatronEngine(model_config(args))
    background: list[SaveTimes] = []
    foreground: list[SaveTimes] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        copy = Path(scratch) / "copy"
        for number in range(args.rounds + 1):
            # Both kinds alternate, so that other work on the machine affects them alike.
            for name, saves in (("background", background), ("foreground", foreground)):
                times = measure_save(engine, Path(scratch) / f"{name}{number}", copy)
                if number:  # the first round warms up
                    saves.append(times)
    engine.close()
    all_saves = background + foreground
    blocked = {
        "background": round(statistics.median(times.start for times in background), 3),
        "foreground": round(statistics.median(times.whole for times in foreground), 3),
    }
    num_bytes = all_saves[-1].num_bytes
    save_rate = num_bytes / statistics.median(times.whole for times in all_saves)
    copy_rate = num_bytes / statistics.median(times.copy for times in all_saves)
    result = {
        "gigabytes": round(num_bytes / 1e9, 3),
        "blocked_seconds": blocked,
        "background_over_foreground": round(blocked["background"] / blocked["foreground"], 3),
        "save_mb_per_second": round(save_rate / 1e6),
        "copy_mb_per_second": round(copy_rate / 1e6),
        "save_over_copy": round(save_rate / copy_rate, 3),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
