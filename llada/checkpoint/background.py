"""Writes a checkpoint while training goes on.

Megatron-Core plans a save on the main thread and returns a function that writes this rank's files.
Its own callers run that function in spawned or forked processes. Here a thread of this process runs
it: so nothing can outlive a killed rank, and nothing has to be started before the first step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from llada.files import checksum
from llada.types import JsonObject

ShardedState: TypeAlias = dict[str, Any]
"""Megatron-Core's sharded state dict: nested dicts and lists with sharded tensors as leaves."""
WriteBucket: TypeAlias = tuple[str, str, object]
"""Megatron-Core's plan of one file: path, name, and what goes into it."""


def snapshot(state: ShardedState) -> ShardedState:
    """Replace the CPU tensors of a sharded state by copies, which later steps do not change.

    GPU tensors stay: the save copies them to host memory itself.
    """
    return dict_list_map_inplace(_copy_if_on_cpu, state)


def _copy_if_on_cpu(value: object) -> object:
    if not isinstance(value, (ShardedTensor, ShardedTensorFactory)):
        return value
    if value.data is not None and value.data.device.type == "cpu":
        value.data = value.data.detach().clone()
    return value


class BackgroundSave:
    """A save in progress. Once it is created, training may change the weights.

    Args:
        request: what Megatron-Core planned.

    Attributes:
        error: what went wrong on this rank, once `done`.
        files: size and checksum of every file this rank wrote, by name, once `done`.
    """

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self.error: BaseException | None = None
        self.files: dict[str, JsonObject] = {}
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            # Copies the tensors from the GPU to host memory, now: the next step changes them.
            arguments[1] = request.preload_fn()
        self._thread = threading.Thread(
            target=self._write, args=(arguments,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def done(self) -> bool:
        """Return whether this rank has written its files."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until this rank has written its files."""
        self._thread.join()

    def finish(self) -> None:
        """Write the metadata; collective, once every rank is done without an error."""
        self.wait()
        for function in self._request.finalize_fns:
            function()

    def _write(self, arguments: Sequence[Any]) -> None:
        if self._request.async_fn is None:
            return  # this rank has nothing to write
        buckets: Sequence[WriteBucket] = arguments[1]
        try:
            self._request.async_fn(*arguments, **self._request.async_fn_kwargs)
            self.files = {name: checksum(Path(path)) for path, name, _ in buckets}
        except BaseException as error:  # the main thread reports it, on every rank
            self.error = error


class _NoCount:
    """Stands in for the queue in which Megatron-Core's writer counts finished workers."""

    def get(self) -> None:
        return

    def task_done(self) -> None:
        return


def _write_in_threads(
    transforms: Sequence[object],
    use_msc: bool,
    rank: int,
    buckets: Sequence[WriteBucket],
    results: queue.Queue[object],
) -> None:
    """Write every bucket to its file, each in a thread.

    Replaces a static method of Megatron-Core that starts processes, so the parameters are its own.
    `results` takes bucket index -> written items, or the first error.
    """
    write_bucket = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def write(index: int) -> object:
        own_results: queue.Queue[tuple[int, object]] = queue.Queue()
        write_bucket(transforms, index, buckets[index], own_results, _NoCount(), use_fsync=True)
        _, written_or_error = own_results.get()
        return written_or_error

    with ThreadPoolExecutor(max_workers=len(buckets)) as pool:
        outcomes = list(pool.map(write, range(len(buckets))))
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            results.put(outcome)
            raise outcome
    results.put(dict(enumerate(outcomes)))


def write_in_threads() -> None:
    """Make Megatron-Core write checkpoints in threads, and collect the results in this process."""
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(
        _write_in_threads
    )
    if filesystem_async._results_queue is None:
        # By default a multiprocessing queue, whose manager would be one more process.
        filesystem_async._results_queue = queue.Queue()
