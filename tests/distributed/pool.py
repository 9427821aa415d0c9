"""A pool of gloo ranks, started once for many tests."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from tests import processes


class RankPool:
    """Processes in one gloo world; `run` calls a module-level function on every rank.

    Args:
        size: Number of ranks.
        folder: For the rendezvous file.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        with Listener(family="AF_UNIX") as listener:
            store = str(folder / "store")
            command = ("-m", "tests.distributed.pool", listener.address, store, str(size))
            # The ranks get functions by name and import them from where this process does: pytest
            # has added the folders of the tests to sys.path.
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(processes.ROOT), *sys.path]),
            }
            self._processes = [
                processes.start(
                    *command,
                    str(rank),
                    cwd=processes.ROOT,
                    env=environment,
                    stdout=processes.DEVNULL,
                    stderr=None,
                )
                for rank in range(size)
            ]
            accepted = [listener.accept() for _ in range(size)]
        for end in accepted:
            # Tensors are passed in shared memory, under this key.
            end.send(bytes(multiprocessing.current_process().authkey))
        self._ends: list[Connection] = [
            end for _, end in sorted((end.recv(), end) for end in accepted)
        ]

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 600) -> list[Any]:
        """Return the results of `function(*args)` on all ranks, in the order of the ranks.

        An exception on a rank fails the test with its traceback.
        """
        for end in self._ends:
            end.send((function, args))
        results = []
        errors = []
        for rank, end in enumerate(self._ends):
            if not end.poll(timeout):
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s")
            succeeded, value = end.recv()
            if succeeded:
                results.append(value)
            else:
                errors.append(value)
        if errors:
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.wait(timeout=600)


def work(address: str, store: str, size: int, rank: int) -> None:
    """Run the functions that the pool sends, until it closes."""
    from llada.engine import cpu

    cpu.before_import()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with Client(address) as end:
        end.send(rank)
        multiprocessing.current_process().authkey = end.recv()
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=300),
        )
        while (task := end.recv()) is not None:
            function, args = task
            try:
                end.send((True, function(*args)))
            except BaseException:
                end.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
