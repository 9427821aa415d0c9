"""A pool of gloo ranks, spawned once for many tests: importing torch and Megatron-Core for every test would be too slow."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


class RankPool:
    """`size` processes in one gloo world; `run` calls a module-level function on every rank.

    Args:
        size: ranks.
        folder: for the rendezvous file.
    """

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.size = size
        pipes = [context.Pipe() for _ in range(size)]
        self._ends: list[Connection] = [ours for ours, _ in pipes]
        self._processes = [context.Process(target=_work, args=(rank, size, str(folder / "store"), pipes[rank][1])) for rank in range(size)]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """The results of `function(*args)` on every rank; a rank's exception fails the test with its traceback."""
        for end in self._ends:
            end.send((function, args))
        results, errors = [], []
        for rank, end in enumerate(self._ends):
            if not end.poll(timeout):
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s")
            fine, value = end.recv()
            (results if fine else errors).append(value)
        if errors:
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _work(rank: int, size: int, store: str, end: Connection) -> None:
    ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the test run
    from llada.engine import cpu

    cpu.before_import()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60))
    while (task := end.recv()) is not None:
        function, args = task
        try:
            end.send((True, function(*args)))
        except BaseException:
            end.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
