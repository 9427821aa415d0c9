"""RUN/metrics.jsonl: one JSON object per line, for every step and every validation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from llada.evaluation import validation_files
from llada.files import write_atomically

FILE = "metrics.jsonl"

MetricsLine: TypeAlias = dict[str, Any]
"""A line: `step` first, then numbers, or dicts of numbers for the corpora of a validation."""


class JsonLines:
    """Appends to metrics.jsonl, in order of the steps.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115  # open for the whole run

    def write(self, line: MetricsLine) -> None:
        # Each line is written and flushed at once: a killed process leaves at most one torn line.
        self._file.write(json.dumps(finite(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush to disk: a checkpoint must not be more durable than the lines before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def is_step(line: MetricsLine) -> bool:
    """Return whether a line is a step's. The other lines are those of validations."""
    return "loss" in line


def finite(value: object) -> object:
    """Replace nan and infinity by strings, in nested dicts and lists: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read(path: Path) -> Iterator[MetricsLine]:
    """Read the lines of a metrics.jsonl; a torn last line is left out."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = _parse(text)
        if line is not None:
            yield line


def _parse(text: str) -> MetricsLine | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if isinstance(line, dict) and isinstance(line.get("step"), int):
        return line
    return None


def cut(folder: Path, step: int) -> int:
    """Cut metrics.jsonl back to the lines up to `step`, as a resumed run needs it.

    The other lines, a torn one included, go to metrics.attempt-N.jsonl, and the files of later
    validations to validation.attempt-N. At step 0 the validation before the first step goes too: it
    is measured again.

    Args:
        folder: the run folder.
        step: steps done at the start of the run.

    Returns:
        How many lines were cut.
    """
    path = folder / FILE
    attempt = 1 + sum(1 for _ in folder.glob("metrics.attempt-*.jsonl"))
    validation_files.supersede(folder, step, attempt)
    if not path.exists():
        return 0
    kept: list[str] = []
    dropped: list[str] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = _parse(text)
        if step and line is not None and line["step"] <= step:
            kept.append(text)
        else:
            dropped.append(text)
    if dropped:
        # First the copy: a process that is killed between the two loses no line.
        write_atomically(folder / f"metrics.attempt-{attempt}.jsonl", "\n".join(dropped) + "\n")
        write_atomically(path, "".join(text + "\n" for text in kept))
    return len(dropped)
