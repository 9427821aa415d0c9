"""A plain loop in a process of its own: it takes a step when it is told to.

So its memory is its own, and its steps can alternate with those of another process.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch
from plain_loop import PlainLoop
from step_batches import make_batches

from llada.config import RunConfig


class PlainProcess:
    """Start the process of a plain loop.

    Args:
        config: The run.
        device: Where to compute.
        every_position: Compute the logits of every position; else those of the predicted ones.
    """

    def __init__(self, config: RunConfig, device: torch.device, every_position: bool) -> None:
        # Not multiprocessing, which would import the calling program, and Megatron-Core with it.
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._send((config, device, torch.get_num_threads(), every_position))

    def step(self, number: int) -> float:
        """Train on the batches of a step; return the seconds of the step."""
        self._send(number)
        return self._receive()

    def close(self) -> float:
        """End the process; return its peak memory, GB."""
        self._send(None)
        peak = self._receive()
        self._process.wait()
        return peak

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        _write(self._process.stdin, value)

    def _receive(self) -> float:
        assert self._process.stdout is not None
        try:
            received: float = pickle.load(self._process.stdout)
        except EOFError:
            code = self._process.wait()
            raise SystemExit(f"the process of the plain loop exited with {code}") from None
        return received


def _write(stream: IO[bytes], value: object) -> None:
    pickle.dump(value, stream)
    stream.flush()


def main() -> None:
    """Take the steps whose numbers arrive, until None arrives; then send the peak memory, GB."""
    config, device, threads, every_position = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    loop = PlainLoop(config, device, every_position)
    while (number := pickle.load(sys.stdin.buffer)) is not None:
        batches, _ = make_batches(config, number, whole_rows=True)
        start = time.perf_counter()
        loop.step(batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        _write(sys.stdout.buffer, time.perf_counter() - start)
    _write(sys.stdout.buffer, _peak_memory_gb(device))


def _peak_memory_gb(device: torch.device) -> float:
    """Peak of the allocated memory of a GPU; on a CPU of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # getrusage would count the parent's as well, if it was larger when it started this process.
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024 / 1e9


if __name__ == "__main__":
    main()
