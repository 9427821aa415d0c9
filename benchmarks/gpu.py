"""Check this project on a GPU machine, in under ten minutes: tests, then the speed of a step.

    make gpu
    python benchmarks/gpu.py --json gpu.json

Runs the tests marked `gpu` and benchmarks/train_step.py, and prints a Markdown table with the
device and the versions, for docs/performance.md. Nothing is downloaded. Without a GPU the same
tests and measurements run on the CPU at a toy size, which checks this script and nothing else.
Other options are passed on to benchmarks/train_step.py.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llada.device import gpu_available

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "megatron-core", "flash-attn", "transformers", "numpy")
TOY = ["--vocabularies", "1024", "--layers", "2", "--rows", "4", "--steps", "2"]
"""Options of train_step.py for a machine without a GPU."""
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
RATIO = "time_over_plain_"
"""Start of the name of a ratio to one of train_step.py's plain loops."""

StepResult = dict[str, Any]
"""A line of benchmarks/train_step.py."""


@dataclass(frozen=True)
class TestResult:
    """One test.

    Attributes:
        name: Of the test.
        outcome: "passed", "failure", "error" or "skipped".
        seconds: How long it took.
        measured: What the test recorded, by name.
    """

    name: str
    outcome: str
    seconds: float
    measured: dict[str, str]


def describe_machine(gpu: bool) -> dict[str, str]:
    """The device, its driver, and the versions of the packages that compute."""
    machine = {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "python": platform.python_version(),
    }
    if gpu:
        free, total = torch.cuda.mem_get_info()
        machine["memory"] = f"{total / 1e9:.0f} GB ({free / 1e9:.0f} free)"
        machine["CUDA"] = str(torch.version.cuda)
        machine["cuDNN"] = str(torch.backends.cudnn.version())
        machine["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in PACKAGES:
        try:
            machine[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            machine[package] = "not installed"
    return machine


def run_tests(gpu: bool, folder: Path) -> tuple[int, list[TestResult]]:
    """Run the tests; return the exit code of pytest and the results."""
    report = folder / "junit.xml"
    # Without a GPU only the tests in tests/gpu that also run on a CPU.
    selection = ["-m", "gpu"] if gpu else ["tests/gpu", "-m", "not gpu"]
    # xunit1 is the format in which a test may record what it measured.
    options = ["-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    command = [sys.executable, "-m", "pytest", *selection, *options]
    code = subprocess.run(command, cwd=ROOT, env=_environment()).returncode
    if not report.exists():
        return code, []
    return code, [_parse_test(case) for case in ElementTree.parse(report).iter("testcase")]


def _parse_test(case: ElementTree.Element) -> TestResult:
    outcome = "passed"
    for kind in ("failure", "error", "skipped"):
        if case.find(kind) is not None:
            outcome = kind
            break
    measured = {item.get("name", ""): item.get("value", "") for item in case.iter("property")}
    return TestResult(case.get("name", ""), outcome, float(case.get("time", 0)), measured)


def measure_step(gpu: bool, arguments: list[str], folder: Path) -> tuple[int, list[StepResult]]:
    """Run benchmarks/train_step.py; return its exit code and its lines."""
    script = str(ROOT / "benchmarks/train_step.py")
    command = [sys.executable, "-W", "ignore", script, *arguments]
    if not gpu:
        command = [sys.executable, "-W", "ignore", script, *TOY, *arguments]
    output = folder / "train_step.txt"
    with open(output, "w") as file:
        code = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=file).returncode
    text = output.read_text()
    print(text, flush=True)
    return code, [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _environment() -> dict[str, str]:
    paths = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def markdown(machine: dict[str, str], tests: list[TestResult], steps: list[StepResult]) -> str:
    """All results as Markdown tables."""
    lines = ["| Machine | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in machine.items()]
    lines += ["", "| Test | Outcome | Seconds | Measured |", "|---|---|---|---|"]
    for test in tests:
        measured = "; ".join(f"{name} {value}" for name, value in test.measured.items())
        lines.append(f"| {test.name} | {test.outcome} | {test.seconds:.1f} | {measured} |")
    lines += [
        "",
        f"| Compared with | {' | '.join(SPEED_COLUMNS)} | time over it |",
        "|---" * (len(SPEED_COLUMNS) + 2) + "|",
    ]
    lines += [_step_row(step) for step in steps]
    return "\n".join(lines)


def _step_row(step: StepResult) -> str:
    """A step's row: the plain loop that it was compared with, the speed, the ratio."""
    loop = ""
    ratio = ""
    for name, value in step.items():
        if name.startswith(RATIO):
            loop = name.removeprefix(RATIO).replace("_", " ")
            ratio = value
            break
    columns = " | ".join(str(step[name]) for name in SPEED_COLUMNS)
    return f"| {loop} | {columns} | {ratio} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write all results to this file")
    parser.add_argument(
        "--tests-only", action="store_true", help="do not measure the speed of a step"
    )
    # Unknown options are for benchmarks/train_step.py.
    args, step_options = parser.parse_known_args()
    gpu = gpu_available()
    started = time.perf_counter()
    machine = describe_machine(gpu)
    # Before the tests: a run that is cut short shows where it ran.
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    steps: list[StepResult] = []
    with tempfile.TemporaryDirectory() as folder:
        code, tests = run_tests(gpu, Path(folder))
        if not args.tests_only:
            step_code, steps = measure_step(gpu, step_options, Path(folder))
            code = code or step_code
    machine["seconds in all"] = f"{time.perf_counter() - started:.0f}"
    if args.json:
        results = {
            "machine": machine,
            "tests": [asdict(test) for test in tests],
            "steps": steps,
        }
        Path(args.json).write_text(json.dumps(results, indent=1))
    print("\n" + markdown(machine, tests, steps))
    return code


if __name__ == "__main__":
    sys.exit(main())
