"""Worker processes on this machine: each asks for a unit, reports its progress, and asks again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeAlias

from data_tools.types import Advance
from llada.errors import RunError, UserError

Work: TypeAlias = Callable[[int, Advance], None]
"""Does the unit with a number. It is pickled, so it opens what it needs in the worker process."""


# -- messages from a worker to the process that started it -----------------------------------------


@dataclass(frozen=True)
class _Ready:
    """A request for a unit. The answer is the unit's number, or None if no unit is left."""


@dataclass(frozen=True)
class _Progress:
    text_bytes: int
    tokens: int
    left_out: int


@dataclass(frozen=True)
class _Failed:
    """An error that is meant for the user; it is raised again as it is."""

    error: Exception


@dataclass(frozen=True)
class _Crashed:
    """Any other exception. Its traceback is sent as text: not every exception can be pickled."""

    trace: str


# -- processes -------------------------------------------------------------------------------------


def run(work: Work, units: Sequence[int], workers: int, advance: Advance) -> None:
    """Do some units, in this process or in worker processes.

    Workers end when this function returns or raises, and when this process is killed.

    Args:
        work: function that does one unit.
        units: numbers of the units, in the order in which they are handed out.
        workers: number of processes; with one worker, or one unit, no process is started.
        advance: called in this process with the progress of all units.

    Raises:
        RunError: a worker was killed.
        RuntimeError: a worker crashed; the message is its traceback.
        UserError, RunError, OSError: as `work` raised them.
    """
    num_processes = min(workers, len(units))
    if num_processes < 2:
        for unit in units:
            work(unit, advance)
        return
    # A forked worker would inherit threads and locks of the tokenizer libraries.
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(num_processes):
            our_end, worker_end = context.Pipe()
            process = context.Process(target=_serve, args=(work, worker_end), daemon=True)
            process.start()
            # Now only the worker has its end open, so reading ours fails when the worker dies.
            worker_end.close()
            processes[our_end] = process
        _hand_out(processes, units, advance)
    finally:
        for pipe, process in processes.items():
            process.terminate()
            process.join()
            pipe.close()


def _hand_out(
    processes: dict[Connection, SpawnProcess], units: Sequence[int], advance: Advance
) -> None:
    """Answer the workers until each of them knows that no unit is left."""
    remaining = list(reversed(units))  # popped from the end, so the first unit goes out first
    busy = set(processes)
    while busy:
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except (EOFError, ConnectionResetError):
                processes[pipe].join()
                raise RunError(
                    f"a worker ended with exit code {processes[pipe].exitcode}; what is finished is"
                    " kept: run the same command again, with fewer --workers if memory ran out"
                ) from None
            if isinstance(message, _Progress):
                advance(message.text_bytes, message.tokens, message.left_out)
            elif isinstance(message, _Ready):
                if remaining:
                    pipe.send(remaining.pop())
                else:
                    pipe.send(None)
                    busy.remove(pipe)
            elif isinstance(message, _Failed):
                raise message.error
            elif isinstance(message, _Crashed):
                raise RuntimeError(message.trace)
            else:
                raise AssertionError(f"unknown message {message!r}")


def _serve(work: Work, pipe: Connection) -> None:
    """Run a worker process until no unit is left or the other end of its pipe is gone."""
    # Ctrl-C reaches all processes of the terminal. The process that started the workers ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # There is a process per core, so threads would only compete for the cores.
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

    def advance(text_bytes: int, tokens: int, left_out: int) -> None:
        pipe.send(_Progress(text_bytes, tokens, left_out))

    try:
        while (unit := _next_unit(pipe)) is not None:
            work(unit, advance)
    except (BrokenPipeError, ConnectionResetError):
        return
    except (UserError, RunError, OSError) as error:
        pipe.send(_Failed(error))
    except Exception:
        pipe.send(_Crashed(traceback.format_exc()))


def _next_unit(pipe: Connection) -> int | None:
    """Ask for a unit; return None if no unit is left or nobody answers."""
    try:
        pipe.send(_Ready())
        answer = pipe.recv()
    except (EOFError, OSError):
        return None
    if answer is None:
        return None
    return int(answer)
