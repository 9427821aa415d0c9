"""The interface between the training loop and an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch

from llada.checkpoint.saving import PendingSave
from llada.engine.rank_batch import RankBatch
from llada.model.weights import Weights
from llada.objectives.base import Batch

T = TypeVar("T")


class StepResult:
    """The result of one optimizer step, the same on every rank.

    Reading a number waits until the step is done on the device.

    Args:
        numbers: Loss, squared gradient norm before clipping, and 1 if the step was skipped, else 0;
            float64 [3]. A GPU tensor is copied to the host after the work queued so far, without
            waiting for it.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            # Only a copy into page-locked memory runs in the background.
            on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers = on_host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def done(self) -> bool:
        """Whether the numbers can be read without waiting."""
        return self._event is None or self._event.query()

    @cached_property
    def _values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()

    @property
    def loss(self) -> float:
        """Loss of the global step, in nats, divided by the step's normalizer."""
        return self._values[0]

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the gradient before clipping."""
        squared = self._values[1]
        # A comparison with NaN is false.
        return math.sqrt(squared) if squared >= 0 else math.nan

    @property
    def applied(self) -> bool:
        """False if loss or norm was not finite or above its limit; then nothing was updated."""
        return self._values[2] == 0


class Limits(NamedTuple):
    """The largest loss and gradient norm with which a step is applied."""

    loss: float = math.inf
    grad_norm: float = math.inf


NO_LIMITS = Limits()


@dataclass(frozen=True)
class ParallelRank:
    """The position of this process among all processes.

    Attributes:
        rank: Among all processes.
        world_size: Number of processes.
        data_rank: Among the replicas of the model, of which each reads its own micro-batches.
        data_size: Number of replicas.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


class Engine(Protocol):
    """Owns model, optimizer and their state on all ranks.

    Every method is collective (all ranks must call it) unless it says otherwise.
    """

    parallel_rank: ParallelRank
    device: torch.device

    def prepare(self, batch: Batch) -> RankBatch:
        """Cut out of a micro-batch what this rank needs. Not collective; any thread may call it."""
        ...

    def train_step(
        self, batches: Sequence[Batch | RankBatch], learning_rate: float, limits: Limits = NO_LIMITS
    ) -> StepResult:
        """Run forward and backward over this replica's micro-batches, then one optimizer update.

        There is no update if loss or gradient norm exceed the limits. The micro-batches may come
        from `prepare`.
        """
        ...

    def evaluate(self, batches: Sequence[Batch | RankBatch], num_segments: int) -> torch.Tensor:
        """Sum weights * loss of every segment id over all replicas.

        Returns:
            float64 [num_segments] on CPU, the same on every rank.
        """
        ...

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        ...

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is set on any rank, in one collective."""
        ...

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank; small and picklable."""
        ...

    def start_save(self, folder: Path) -> PendingSave:
        """Start to write model and optimizer into an existing empty folder.

        Returns as soon as later steps cannot change what is written.
        """
        ...

    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Read a save of any layout; without `optimizer` only the weights."""
        ...

    def load_canonical(self, source: Weights) -> None:
        """Take the weights from canonical tensors and reset the optimizer."""
        ...

    def peak_memory_gb(self) -> float:
        """Largest memory use of this rank so far, in GB: of the GPU, or on CPU of the process."""
        ...

    def close(self) -> None:
        """Leave the process groups."""
        ...
