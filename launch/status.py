"""What a run looks like from outside: its files, its events, and what Slurm says."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import slurm
from launch.job import spec as jobs
from launch.job.policy import this_launch
from launch.slurm import Job
from llada import events
from llada.errors import RunError, UserError
from llada.training import lock

_TAIL = 1 << 18
_ENDS = ("finished", "failed", "stopped", "cancelled")
_ASK_SECONDS = 10.0
"""Between questions to Slurm while a log is followed: its controller serves everybody."""
_REASONS = {
    "Resources": "waits for nodes to become free",
    "Priority": "other jobs come first",
    "BeginTime": "waits until the time it asked for (after a failure: the back-off)",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": (
        "waits for a job that can no longer end as it should; cancel this one"
    ),
    "PartitionTimeLimit": (
        "asks for more time than the partition allows, so it will never start; lower `time` in the"
        " profile"
    ),
    "PartitionNodeLimit": (
        "asks for more nodes than the partition allows or has, so it will never start; fewer"
        " --nodes"
    ),
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "BadConstraints": (
        "no node is left that fits (constraints, excluded nodes), so it will never start"
    ),
    "ReqNodeNotAvail": "a node it needs is down, drained or reserved",
    "Reservation": "waits for its reservation to begin",
    "JobHeldUser": "is held; `scontrol release` lets it go",
    "JobHeldAdmin": "is held by an administrator",
    "launch failed requeued held": (
        "could not be started and is held; `scontrol release` lets it try again"
    ),
    "Cleaning": "its earlier attempt is being cleaned up",
    "Licenses": "waits for a licence",
}


@dataclass(frozen=True)
class Status:
    """A run from outside; fields that are not known are None.

    Attributes:
        run: its folder.
        task: pretrain, sft, or "data".
        state: RUNNING, PENDING, COMPLETING, FINISHED, STOPPED, CANCELLED, FAILED, LOST, or "IDLE":
            nothing runs, nothing ended it.
        reason: why it is pending, or why it ended.
        jobs: the jobs of its latest launch, as "id state".
        nodes: where it runs.
        step, steps: done, and in all.
        loss, tokens_per_second: of the last step.
        eta_seconds: until the last step, at the present speed.
        checkpoint: step of the latest complete one.
        attempt, restarts, last_error: of the launcher.
        tasks: of data preparation: how many are in which state.
    """

    run: str
    task: str | None = None
    state: str = "IDLE"
    reason: str | None = None
    jobs: list[str] | None = None
    nodes: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | str | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    checkpoint: int | None = None
    attempt: int | None = None
    restarts: int | None = None
    last_error: str | None = None
    then: str | None = None

    def __str__(self) -> str:
        rows = [
            ("run", self.run),
            ("state", f"{self.state}{': ' + self.reason if self.reason else ''}"),
        ]
        if self.jobs:
            shown = self.jobs[:8] + (["..."] if len(self.jobs) > 8 else [])
            rows.append(("jobs", ", ".join(shown) + (f" on {self.nodes}" if self.nodes else "")))
        if self.then:
            rows.append(("then", self.then))
        if self.steps is not None:
            rows.append(
                (
                    "step",
                    (
                        f"{self.step or 0} of {self.steps}; latest checkpoint"
                        f" {self.checkpoint or 'none'}"
                    ),
                )
            )
        if self.loss is not None and self.tokens_per_second is not None:
            rows.append(
                ("loss", f"{self.loss:.4f}" if isinstance(self.loss, float) else str(self.loss))
            )
            rows.append(
                (
                    "speed",
                    f"{self.tokens_per_second:,.0f} tokens/s; {_duration(self.eta_seconds)} to go",
                )
            )
        if self.restarts is not None:
            rows.append(
                (
                    "restarts",
                    str(self.restarts)
                    + (f"; last error: {self.last_error}" if self.last_error else ""),
                )
            )
        return "\n".join(f"{name:<9} {value}" for name, value in rows)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def state_folder(path: str) -> Path:
    """The folder with a run's events: the run's own, or of a corpus in preparation the one beside
    it.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    for candidate in (folder, folder.with_name(f"{folder.name}.launch")):
        if (candidate / events.FILE).is_file() or (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(f"RUN: '{path}' is no run (it has neither {events.FILE} nor config.yaml)")


def status(folder: Path, ask_of_ended: bool = True) -> Status:
    """What is known of a run.

    Args:
        folder: of the run.
        ask_of_ended: ask Slurm for the jobs of a run, too, that itself said how it ended.
    """
    lines = events.read(folder)
    sent = latest(folder)
    ids = sent.jobs if sent else []
    then = [sent.then] if sent and sent.then else []
    ask = ask_of_ended or not (lines and lines[-1]["event"] in _ENDS)
    known = slurm.jobs([*ids, *then]) if ids and ask and slurm.installed() else {}
    config = _config(folder)
    last = _last_steps(folder / "metrics.jsonl")
    step = last[-1] if last else {}
    steps = (config.get("train") or {}).get("steps")
    seconds = statistics.median(line["seconds"] for line in last) if last else None
    state, reason = _state(
        folder, lines, [known[one] for one in ids if one in known], step.get("step"), steps
    )
    live = [known[one] for one in ids if one in known and known[one].live]
    told = events.restarts(lines)
    return Status(
        run=str(folder),
        task=config.get("task", "pretrain") if config else "data",
        state=state,
        reason=reason,
        jobs=[f"{job.id} {job.state}" for one in ids if (job := known.get(one))] or None,
        nodes=next((job.nodes for job in live if job.nodes), None),
        step=step.get("step"),
        steps=steps,
        loss=step.get("loss"),
        tokens_per_second=step.get("tokens_per_second"),
        eta_seconds=(
            seconds * (steps - step["step"]) if seconds is not None and steps is not None else None
        ),
        checkpoint=jobs.latest_checkpoint(folder),
        then=(
            f"{then[0]} {known[then[0]].state}{_because(known[then[0]])}"
            if then and then[0] in known
            else None
        ),
        **told,
    )


def latest(folder: Path) -> jobs.Submitted | None:
    """What the latest launch submitted."""
    return next(
        (
            sent
            for path in reversed(jobs.launches(folder))
            if (sent := jobs.submitted(path)) is not None
        ),
        None,
    )


def live_jobs(folder: Path) -> list[Job]:
    """Jobs of a run that Slurm still has, of all its launches; oldest first."""
    ids = [
        one
        for path in jobs.launches(folder)
        if (sent := jobs.submitted(path))
        for one in (*sent.jobs, *([sent.then] if sent.then else []))
    ]
    if not ids or not slurm.installed():
        return []
    return slurm.live(ids)


def stop(folder: Path) -> str:
    """Ask a run to end with a checkpoint, and cancel what of it waits in the queue; what was done,
    in words.

    Raises:
        UserError: it runs on another machine, out of reach.
    """
    for path in jobs.launches(folder):
        (path / jobs.STOP).touch()
    found = live_jobs(folder)
    running = [job for job in found if job.state in ("RUNNING", "SUSPENDED")]
    slurm.cancel(
        *(job.id for job in found if job.state not in ("RUNNING", "SUSPENDED", "COMPLETING"))
    )
    for job in running:
        refused = slurm.send_signal("USR1", job.id, batch=True)
        if refused is not None:
            raise RunError(f"stop: job {job.id}: {refused}")
    if found:
        ending = [job.id for job in found if job.state == "COMPLETING"]
        waiting = [job.id for job in found if job not in running and job.id not in ending]
        done = (
            [f"job {', '.join(job.id for job in running)} stops with a checkpoint after its step"]
            if running
            else []
        )
        done += [f"job {', '.join(waiting)} is cancelled"] if waiting else []
        done += (
            [f"job {', '.join(ending)} is being ended; should it come back, it stops at once"]
            if ending
            else []
        )
        return f"{folder}: {'; '.join(done)}"
    return _stop_here(folder)


def _stop_here(folder: Path) -> str:
    process = lock.holding_process(folder)
    if process is None and _supervisor(events.read(folder)) is not None:
        return f"{folder}: it has just started, or waits for its next start, and ends before it"
    if process is None:
        return f"{folder}: nothing runs, so there is nothing to stop"
    host, pid = process
    if host != os.uname().nodename:
        raise UserError(f"stop: '{folder}' is held by process {pid} on host {host}; stop it there")
    os.kill(pid, signal.SIGUSR1)
    return f"{folder}: process {pid} stops with a checkpoint after its step"


def runs(roots: list[str]) -> list[Status]:
    """The runs below some folders, three levels deep at most, the latest changed first."""
    found: dict[Path, float] = {}
    for root in roots:
        for depth in ("", "*", "*/*", "*/*/*"):
            for folder in Path(root).glob(depth) if depth else [Path(root)]:
                marks = [
                    path
                    for name in (events.FILE, "metrics.jsonl")
                    if (path := folder / name).is_file()
                ]
                if marks:
                    found[folder] = max(path.stat().st_mtime for path in marks)
    return [
        status(folder, ask_of_ended=False)
        for folder in sorted(found, key=lambda folder: -found[folder])
    ]


def table(rows: list[Status]) -> str:
    """Runs as a table."""
    header = ("run", "task", "state", "step", "loss", "tokens/s", "to go", "restarts")
    cells = [
        (
            row.run,
            row.task or "",
            row.state,
            f"{row.step or 0}/{row.steps}" if row.steps else "",
            f"{row.loss:.4f}" if isinstance(row.loss, float) else str(row.loss or ""),
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "",
            _duration(row.eta_seconds) if row.state == "RUNNING" else "",
            "" if row.restarts is None else str(row.restarts),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *cells]
    )


# -- logs ------------------------------------------------------------------------------------------


def logs(
    folder: Path, rank: int, attempt: int | None, task: int | None, follow: bool
) -> Iterator[bytes]:
    """The log of a rank, of the latest attempt or the one named; with `follow` what is added,
    through restarts, until the run ends.
    """
    shown: Path | None = None
    position, asked, over = 0, float("-inf"), False
    while True:
        path = _log(folder, rank, attempt, task)
        if path is None and (over or not follow):
            raise UserError(_no_log(folder, rank, attempt, task))
        if path is not None:
            if shown is not None and path != shown:
                yield _rest(shown, position)
                yield f"--- {path}\n".encode()
                position = 0
            shown = path
            chunk = _rest(path, position)
            position += len(chunk)
            yield chunk
        if over or not follow:
            return
        if time.monotonic() - asked > _ASK_SECONDS:
            alive = lock.holder(folder) or _supervisor(events.read(folder))
            asked, over = time.monotonic(), not live_jobs(folder) and alive is None
        else:
            time.sleep(1.0)


def _rest(path: Path, position: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(position)
        return file.read()


def _log(folder: Path, rank: int, attempt: int | None, task: int | None) -> Path | None:
    parent = folder / "logs" if task is None else folder / "logs" / f"task-{task:05d}"
    for attempt_folder in sorted(
        parent.glob("attempt-*" if attempt is None else f"attempt-{attempt:04d}"), reverse=True
    ):
        path = attempt_folder / f"rank_{rank:05d}.log"
        if path.is_file():
            return path
    if attempt is None and rank == 0:  # nothing of a rank yet: what the batch script itself says
        found = sorted((folder / "logs").glob("job-*.log"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else None
    return None


def _no_log(folder: Path, rank: int, attempt: int | None, task: int | None) -> str:
    parent = folder / "logs" if task is None else folder / "logs" / f"task-{task:05d}"
    attempts = sorted(path.name for path in parent.glob("attempt-*"))
    if not attempts:
        return f"logs: '{parent}' has none yet"
    if attempt is not None and f"attempt-{attempt:04d}" not in attempts:
        return (
            f"--attempt: {attempt} is none of"
            f" {', '.join(name.removeprefix('attempt-').lstrip('0') for name in attempts)}"
        )
    ranks = len(list((parent / attempts[-1]).glob("rank_*.log")))
    return (
        f"--rank: {rank} has no log; there are 0 to {ranks - 1}"
        if ranks
        else f"logs: '{parent / attempts[-1]}' has none yet"
    )


# -- pieces ----------------------------------------------------------------------------------------


def _state(
    folder: Path, lines: list[dict[str, Any]], known: list[Job], step: int | None, steps: int | None
) -> tuple[str, str | None]:
    live = [job for job in known if job.live]
    for wanted in ("RUNNING", "COMPLETING"):
        if any(job.state == wanted for job in live):
            return wanted, None
    if live:
        return live[0].state, _because(live[0]).removeprefix(": ") or None
    ends = [line for line in lines if line["event"] in ("submitted", "started", "requeued", *_ENDS)]
    last = ends[-1] if ends else None
    holder = lock.holder(folder) or _supervisor(lines)
    if holder is not None:
        return "RUNNING", holder
    folded = _tasks(lines)
    if folded is not None:
        return folded
    if last is not None and last["event"] in _ENDS:
        return last["event"].upper(), last.get("reason")
    if known:
        word = known[-1].state
        if word in (
            "CANCELLED",
            "FAILED",
            "TIMEOUT",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "BOOT_FAIL",
            "DEADLINE",
        ):
            return (
                "CANCELLED" if word == "CANCELLED" else "FAILED"
            ), f"Slurm says {word} of job {known[-1].id}"
        return (
            "LOST",
            (
                f"Slurm no longer has job {known[-1].id}, and it did not say how it ended; the same"
                " launch goes on"
            ),
        )
    if last is not None and last["event"] == "started":
        return "LOST", "it ended without a word; the same command goes on"
    return ("FINISHED" if step is not None and step == steps else "IDLE"), None


def _supervisor(lines: list[dict[str, Any]]) -> str | None:
    """The supervisor of a run on this machine, in words, if it is alive; of one in a job Slurm
    knows more.
    """
    last: dict[str, Any] = next(
        (
            line
            for line in reversed(lines)
            if line["event"] in ("submitted", "started", "requeued", *_ENDS)
        ),
        {},
    )
    if (
        last.get("event") in ("submitted", "started", "requeued")
        and "job" not in last
        and last.get("host") == os.uname().nodename
        and "pid" in last
    ):
        with suppress(OSError):
            if b"launch" in Path(f"/proc/{last['pid']}/cmdline").read_bytes():
                return f"process {last['pid']} on host {last['host']}"
    return None


def _tasks(lines: list[dict[str, Any]]) -> tuple[str, str | None] | None:
    """The state of an array, the worst of its tasks'; None: it is none, or nothing of it has ended
    badly and not all has ended.
    """
    last = {
        line["task"]: line
        for line in this_launch(lines)
        if "task" in line and line["event"] in ("started", "requeued", *_ENDS)
    }
    for wanted in ("failed", "cancelled", "stopped"):
        for task, line in sorted(last.items()):
            if line["event"] == wanted:
                return wanted.upper(), f"task {task}: {line.get('reason', '')}"
    return (
        ("FINISHED", None)
        if last and all(line["event"] == "finished" for line in last.values())
        else None
    )


def _because(job: Job) -> str:
    """: Reason (what it means), of a pending job."""
    if not job.reason:
        return ""
    meaning = _REASONS.get(job.reason.strip("()").split(",")[0])
    return f": {job.reason}" + (f" ({meaning})" if meaning else "")


def _config(folder: Path) -> dict[str, Any]:
    """The run's resolved config, from the run or from its latest launch."""
    for path in (
        folder / "config.yaml",
        *(launch / "config.yaml" for launch in reversed(jobs.launches(folder))),
    ):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(content, dict):
            return content
    return {}


def _last_steps(path: Path, count: int = 20) -> list[dict[str, Any]]:
    """The last lines of training steps in a metrics.jsonl; the file is not read whole."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            raw = file.read().splitlines()[1 if size > _TAIL else 0 :]
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    for text in reversed(raw):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "loss" in line and len(found) < count:
            found.append(line)
    return found[::-1]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    days, rest = divmod(int(seconds), 86400)
    return (
        f"{days} d " if days else ""
    ) + f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"


def print_bytes(parts: Iterator[bytes]) -> None:
    """Write log text as it is."""
    for part in parts:
        sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
