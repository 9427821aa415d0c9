"""What a GPU machine proves about this project, in under ten minutes: the tests marked `gpu`, then
the training step's speed.

    make gpu
    python benchmarks/gpu.py --json gpu.json

Prints a table in Markdown, with the device and the versions, for docs/performance.md. Nothing is
downloaded. On a machine without a GPU the same tests and measurements run on the CPU at a toy size,
which proves the script and nothing else. Further options are handed to benchmarks/train_step.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from llada.device import gpu_available

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "megatron-core", "flash-attn", "transformers", "numpy")
TOY = ["--vocabularies", "1024", "--layers", "2", "--rows", "4", "--steps", "2"]
SPEED_COLUMNS = (
    "layers",
    "micro_batches",
    "tokens_per_second",
    "tflops_per_rank",
    "mfu",
    "mfu_full_length",
    "memory_gb",
    "time_over_floor",
)


def machine(gpu: bool) -> dict[str, str]:
    """The device, its driver and the versions of what computes."""
    found = {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "python": platform.python_version(),
    }
    if gpu:
        free, total = torch.cuda.mem_get_info()
        found |= {
            "memory": f"{total / 1e9:.0f} GB ({free / 1e9:.0f} free)",
            "CUDA": str(torch.version.cuda),
        }
        found |= {
            "cuDNN": str(torch.backends.cudnn.version()),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def run_tests(gpu: bool, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit code of pytest, and of every test its name, outcome, seconds and what it measured."""
    report = folder / "junit.xml"
    chosen = ["-m", "gpu"] if gpu else ["tests/gpu", "-m", "not gpu"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *chosen,
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        "-o",
        "junit_family=xunit1",
    ]
    code = subprocess.run(command, cwd=ROOT, env=_environment()).returncode
    if not report.exists():
        return code, []
    return code, [_test(case) for case in ElementTree.parse(report).iter("testcase")]


def _test(case: ElementTree.Element) -> dict[str, Any]:
    outcome = next(
        (kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed"
    )
    measured = {item.get("name", ""): item.get("value", "") for item in case.iter("property")}
    return {
        "name": case.get("name", ""),
        "outcome": outcome,
        "seconds": float(case.get("time", 0)),
        "measured": measured,
    }


def measure_step(gpu: bool, arguments: list[str], folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and the lines of benchmarks/train_step.py."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "benchmarks/train_step.py"),
        *([] if gpu else TOY),
        *arguments,
    ]
    output = folder / "train_step.txt"
    with open(output, "w") as file:
        code = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=file).returncode
    print(output.read_text(), flush=True)
    return code, [
        json.loads(line) for line in output.read_text().splitlines() if line.startswith("{")
    ]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }


def table(found: dict[str, str], tests: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """Everything in Markdown."""
    lines = [
        "| Machine | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in found.items()),
        "",
    ]
    lines += ["| Test | Outcome | Seconds | Measured |", "|---|---|---|---|"]
    for test in tests:
        measured = "; ".join(f"{name} {value}" for name, value in test["measured"].items())
        lines.append(f"| {test['name']} | {test['outcome']} | {test['seconds']:.1f} | {measured} |")
    lines += [
        "",
        f"| Compared with | {' | '.join(SPEED_COLUMNS)} | time over it |",
        "|---" * (len(SPEED_COLUMNS) + 2) + "|",
    ]
    for step in steps:
        ratios = {
            name.removeprefix("time_over_plain_"): value
            for name, value in step.items()
            if name.startswith("time_over_plain_")
        }
        other, ratio = next(iter(ratios.items()), ("", ""))
        lines.append(
            f"| {other.replace('_', ' ')} | {' | '.join(str(step[name]) for name in SPEED_COLUMNS)}"
            f" | {ratio} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write everything that was found to this file too"
    )
    parser.add_argument(
        "--tests-only", action="store_true", help="leave out the training step's speed"
    )
    args, step_options = parser.parse_known_args()  # the rest is for benchmarks/train_step.py
    gpu, started = gpu_available(), time.perf_counter()
    found = machine(gpu)
    print("\n".join(f"{name}: {value}" for name, value in found.items()), flush=True)
    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        code, tests = run_tests(gpu, Path(folder))
        if not args.tests_only:
            step_code, steps = measure_step(gpu, step_options, Path(folder))
            code = code or step_code
    found["seconds in all"] = f"{time.perf_counter() - started:.0f}"
    if args.json:
        Path(args.json).write_text(
            json.dumps({"machine": found, "tests": tests, "steps": steps}, indent=1)
        )
    print("\n" + table(found, tests, steps))
    return code


if __name__ == "__main__":
    sys.exit(main())
