"""Work over processes of this machine: each gets the number of a unit, reports how far it is, and
gets the next.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from llada.errors import RunError, UserError

Advance = Callable[[int, int, int], None]
"""Called with bytes of text, tokens and things left out, of what was done since the last call."""
Work = Callable[[int, Advance], None]
_FEWER = (
    "; what is finished is kept: run the same command again, with fewer --workers if memory ran out"
)


class Job(Protocol):
    """Can be sent to other processes; what it opens there cannot."""

    def open(self, step: str) -> Work: ...


def run(job: Job, step: str, units: Sequence[int], workers: int, advance: Advance) -> None:
    """Do a step of a job for some units. On an exception, or when this process ends, the workers
    end too.

    Raises whatever the work raises; RunError when a worker is killed.
    """
    if min(workers, len(units)) < 2:
        if units:
            work = job.open(step)
            for unit in units:
                work(unit, advance)
        return
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(min(workers, len(units))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(job, step, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        _hand_out(processes, list(units), advance)
    finally:
        for pipe, process in processes.items():
            process.terminate()
            process.join()
            pipe.close()


def _hand_out(
    processes: dict[Connection, SpawnProcess], units: list[int], advance: Advance
) -> None:
    waiting = list(reversed(units))
    busy = dict.fromkeys(processes, True)
    while any(busy.values()):
        for ready in wait([pipe for pipe, works in busy.items() if works]):
            assert isinstance(ready, Connection)
            try:
                kind, content = ready.recv()
            except (EOFError, ConnectionResetError):
                processes[ready].join()
                raise RunError(
                    f"a worker ended with exit code {processes[ready].exitcode}{_FEWER}"
                ) from None
            if kind == "advanced":
                advance(*content)
            elif kind == "failed":
                raise content
            elif kind == "crashed":
                raise RuntimeError(content)
            else:
                busy[ready] = bool(waiting)
                ready.send(waiting.pop() if waiting else None)


def _serve(job: Job, step: str, pipe: Connection) -> None:
    """A worker: ends when it is told to, or when the other end of its pipe is gone."""
    # Ctrl-C is the first process's: it ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

    def advance(*numbers: int) -> None:
        pipe.send(("advanced", numbers))

    try:
        work = job.open(step)
        while (unit := _next(pipe)) is not None:
            work(unit, advance)
    except (BrokenPipeError, ConnectionResetError):
        return
    except (UserError, RunError, OSError) as error:
        pipe.send(("failed", error))
    except Exception:
        pipe.send(("crashed", traceback.format_exc()))


def _next(pipe: Connection) -> int | None:
    try:
        pipe.send(("ready", None))
        unit: Any = pipe.recv()
    except (EOFError, OSError):
        return None
    return None if unit is None else int(unit)
