"""What a checkpoint costs, in one run on one machine.

    python benchmarks/checkpoint.py

Saves the state of a model (weights, moments) in turn in the background and in the foreground, and
copies the same bytes as plain files with fsync. Printed: the seconds that training is blocked by
each kind of save, the bytes per second of a whole save with its checksums, and the ratio to the
copy.
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

import torch

from llada.config import build_config
from llada.engine.megatron import MegatronEngine
from llada.files import sync_tree


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", default=None, help="where to write; the system's temporary folder if left out"
    )
    args = parser.parse_args()
    engine = MegatronEngine(
        build_config(
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
    )
    blocked: dict[str, list[float]] = {"background": [], "foreground": []}
    whole, copies, size = [], [], 0
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for number in range(args.rounds + 1):  # the first round warms up
            for kind in blocked:
                folder = Path(scratch) / f"{kind}{number}"
                folder.mkdir()
                start = time.perf_counter()
                pending = engine.start_save(folder)
                returned = time.perf_counter() - start
                pending.wait()
                if pending.error is not None:
                    raise pending.error
                pending.finish()
                took = time.perf_counter() - start
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                start = time.perf_counter()
                shutil.copytree(folder, Path(scratch) / "copy")
                sync_tree(Path(scratch) / "copy")
                if number:
                    copies.append(time.perf_counter() - start)
                    whole.append(took)
                    blocked[kind].append(returned if kind == "background" else took)
                shutil.rmtree(Path(scratch) / "copy")
                shutil.rmtree(folder)
    engine.close()
    medians = {kind: round(statistics.median(values), 3) for kind, values in blocked.items()}
    rate, copy_rate = size / statistics.median(whole), size / statistics.median(copies)
    print(
        json.dumps(
            {
                "gigabytes": round(size / 1e9, 3),
                "blocked_seconds": medians,
                "background_over_foreground": round(
                    medians["background"] / medians["foreground"], 3
                ),
                "save_mb_per_second": round(rate / 1e6),
                "copy_mb_per_second": round(copy_rate / 1e6),
                "save_over_copy": round(rate / copy_rate, 3),
                "cores": len(os.sched_getaffinity(0)),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
