"""`llada runs`: a table of all runs below some folders."""

from __future__ import annotations

from pathlib import Path

from launch.status import RunStatus, format_duration, format_loss, read_status
from llada import events
from llada.training.reporting import metrics


def list_runs(roots: list[str]) -> list[RunStatus]:
    """Return the runs at most three levels below some folders, the latest changed first."""
    changed: dict[Path, float] = {}
    for root in roots:
        folders = [Path(root)]
        for pattern in ("*", "*/*", "*/*/*"):
            folders += Path(root).glob(pattern)
        for folder in folders:
            files = [folder / events.FILE, folder / metrics.FILE]
            times = [file.stat().st_mtime for file in files if file.is_file()]
            if times:
                changed[folder] = max(times)
    latest_first = sorted(changed, key=lambda folder: -changed[folder])
    return [read_status(folder, query_ended=False) for folder in latest_first]


def format_table(runs: list[RunStatus]) -> str:
    """Format runs as a table."""
    rows = [["run", "task", "state", "step", "loss", "tokens/s", "to go", "restarts"]]
    rows += [_table_row(run) for run in runs]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _table_row(run: RunStatus) -> list[str]:
    step = ""
    if run.steps:
        step = f"{run.step or 0}/{run.steps}"
    speed = ""
    if run.tokens_per_second:
        speed = f"{run.tokens_per_second:,.0f}"
    to_go = ""
    if run.state == "RUNNING":
        to_go = format_duration(run.eta_seconds)
    restarts = ""
    if run.restarts is not None:
        restarts = str(run.restarts)
    loss = ""
    if run.loss is not None:
        loss = format_loss(run.loss)
    return [run.run, run.task or "", run.state, step, loss, speed, to_go, restarts]
