"""Writing a checkpoint while training goes on.

Megatron-Core plans a save on the main thread and hands back a function that writes this rank's
files. Its own callers run that function in spawned or forked processes; here a thread of this
process runs it, so nothing can outlive a killed rank and nothing has to be started before the first
step.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async

from llada.files import checksum


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """Replace the tensors of a sharded state on the CPU by copies, which later steps do not change;
    GPU tensors are copied by the save.
    """

    def copied(value: Any) -> Any:
        if (
            isinstance(value, (ShardedTensor, ShardedTensorFactory))
            and value.data is not None
            and value.data.device.type == "cpu"
        ):
            value.data = value.data.detach().clone()
        return value

    return dict_list_map_inplace(copied, state)


class BackgroundSave:
    """A save in progress: from its creation on the training may change the weights.

    Args:
        request: Megatron-Core's AsyncRequest.

    Attributes:
        error: what went wrong on this rank, once `done`.
        files: size and checksum of every file this rank wrote, by name, once `done`.
    """

    def __init__(self, request: Any) -> None:
        self._request = request
        self.error: BaseException | None = None
        self.files: dict[str, dict[str, Any]] = {}
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()  # GPU -> host memory
        self._thread = threading.Thread(
            target=self._write, args=(arguments,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def done(self) -> bool:
        """Whether this rank has written its files."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until `done`."""
        self._thread.join()

    def finish(self) -> None:
        """Write the metadata; collective, after every rank is done without an error."""
        self.wait()
        for function in self._request.finalize_fns:
            function()

    def _write(self, arguments: list[Any]) -> None:
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*arguments, **self._request.async_fn_kwargs)
                self.files = {name: checksum(Path(path)) for path, name, _ in arguments[1]}
        except BaseException as error:  # reported by the main thread, on every rank
            self.error = error


class _Count:
    """The place of the counting queue that Megatron-Core's writer marks its end in."""

    def get(self) -> None:
        return

    def task_done(self) -> None:
        return


def _write_in_threads(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]
) -> None:
    """Write every bucket to its file, each in a thread; the replacement of Megatron-Core's writer
    processes.
    """
    writer = filesystem_async.FileSystemWriterAsync

    def write(index: int) -> Any:
        own: queue.Queue[Any] = queue.Queue()
        writer.write_preloaded_data(
            transforms, index, buckets[index], own, _Count(), use_fsync=True
        )
        return own.get()[1]

    with ThreadPoolExecutor(max_workers=len(buckets)) as pool:
        found = dict(enumerate(pool.map(write, range(len(buckets)))))
    failed = next((value for value in found.values() if isinstance(value, Exception)), None)
    results.put(found if failed is None else failed)
    if failed is not None:
        raise failed


def write_in_threads() -> None:
    """Make Megatron-Core write checkpoints in threads of this process, their results in a queue of
    this process.
    """
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(
        _write_in_threads
    )
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
