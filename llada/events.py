"""RUN/events.jsonl: what happened to a run, one JSON object a line, from the launcher, the batch
job and rank 0 alike.

Standard library only: the batch job writes here before anything slow is imported.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


class EventLog:
    """Appends events of one run.

    Args:
        folder: of the run.
        common: fields of every event that this writes.
    """

    def __init__(self, folder: Path, **common: Any) -> None:
        self._path = folder / FILE
        self._common = common

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time (seconds since 1970); fields that are None are
        left out.
        """
        values = {"time": round(time.time(), 3), "event": event, **self._common, **fields}
        line = json.dumps({key: value for key, value in values.items() if value is not None}) + "\n"
        # One write to a file opened for appending: lines of several writers do not mix (where they
        # do, `read` leaves them out).
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
            if event != "step":
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(folder: Path) -> list[dict[str, Any]]:
    """The events of a run in the order they were written; torn lines are left out."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("event"), str):
            found.append(line)
    return found


def since_submission(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of the latest launch: from the last `submitted` on, or all without one."""
    start = 0
    for index, line in enumerate(events):
        if line["event"] == "submitted":
            start = index
    return events[start:]


def restarts(events: list[dict[str, Any]]) -> dict[str, Any]:
    """attempt (number of the latest), restarts (attempts of its latest launch but the first) and
    last_error; empty without a launcher.
    """
    events = since_submission(events)
    attempts = {
        line["attempt"] for line in events if line["event"] == "started" and "attempt" in line
    }
    if not attempts:
        return {}
    errors = [line["reason"] for line in events if line.get("failure") and "reason" in line]
    return {
        "attempt": max(attempts),
        "restarts": len(attempts) - 1,
        **({"last_error": errors[-1]} if errors else {}),
    }


def of_this_process(folder: Path) -> EventLog:
    """The event log of a run for a process of it: it knows its attempt and its job from the
    environment.
    """
    attempt = os.environ.get("LLADA_ATTEMPT")
    return EventLog(
        folder, attempt=int(attempt) if attempt else None, job=os.environ.get("SLURM_JOB_ID")
    )
