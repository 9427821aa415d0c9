"""RUN/events.jsonl: what happened to a run, one JSON object per line.

The launcher, the batch job and rank 0 all write to it. Standard library only: the batch job writes
here before anything slow is imported.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "events.jsonl"
Event = dict[str, Any]
"""One line: `time` (seconds since 1970), `event` (its name), and the fields of that event."""
RUN_END_EVENTS = ("finished", "stopped", "cancelled", "failed")
"""Names of the events that end a run."""
ATTEMPT_END_EVENTS = ("requeued", *RUN_END_EVENTS)
"""Names of the events that end an attempt; after `requeued` there is another one."""


class EventLog:
    """Appends events of one run.

    Args:
        folder: the run folder.
        common: fields that every event of this log has.
    """

    def __init__(self, folder: Path, **common: object) -> None:
        self._path = folder / FILE
        self._common = common

    def write(self, event: str, **fields: object) -> None:
        """Append one event with the current time. Fields that are None are left out."""
        values = {"time": round(time.time(), 3), "event": event, **self._common, **fields}
        present = {name: value for name, value in values.items() if value is not None}
        line = json.dumps(present) + "\n"
        # A single write to a file opened with O_APPEND, so that lines of several processes do not
        # mix. Some network file systems interleave them anyway; `read` skips the torn lines.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
            # Steps are frequent, and losing the last few in a crash is harmless.
            if event != "step":
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def of_this_process(folder: Path) -> EventLog:
    """The event log of a run for one of its processes.

    Attempt and Slurm job come from the environment that the launcher set.
    """
    attempt = None
    if os.environ.get("LLADA_ATTEMPT"):
        attempt = int(os.environ["LLADA_ATTEMPT"])
    return EventLog(folder, attempt=attempt, job=os.environ.get("SLURM_JOB_ID"))


def read(folder: Path) -> list[Event]:
    """The events of a run in the order in which they were written, without torn lines."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events


def since_submission(events: list[Event]) -> list[Event]:
    """The events of the latest launch: from the last `submitted` on, all if there is none."""
    submissions = [i for i, event in enumerate(events) if event["event"] == "submitted"]
    if not submissions:
        return events
    return events[submissions[-1] :]


def restarts(events: list[Event]) -> dict[str, Any]:
    """How often the latest launch of a run was restarted, and why.

    Returns:
        `attempt` (number of the latest), `restarts` (attempts after the first) and, if an attempt
        failed, `last_error`. Empty for a run without a launcher.
    """
    events = since_submission(events)
    attempts = {
        event["attempt"] for event in events if event["event"] == "started" and "attempt" in event
    }
    if not attempts:
        return {}
    result: dict[str, Any] = {"attempt": max(attempts), "restarts": len(attempts) - 1}
    errors = [event["reason"] for event in events if event.get("failure") and "reason" in event]
    if errors:
        result["last_error"] = errors[-1]
    return result
