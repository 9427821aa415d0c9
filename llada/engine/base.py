"""What the training loop needs from an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from llada.checkpoint.saving import PendingSave
from llada.model.weights import Weights
from llada.objectives.base import Batch


class StepResult:
    """One optimizer step, the same on every rank. Asking for its numbers waits until the step is
    done on the device.

    Args:
        numbers: loss, squared gradient norm before clipping, and 1 if the step was left out, else
            0; float64 [3]. A GPU tensor is copied to the host behind the work queued so far,
            without waiting for it.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(
                numbers, non_blocking=True
            )
            self._event = torch.cuda.Event()
            self._event.record()

    def done(self) -> bool:
        """Whether the numbers are there."""
        return self._event is None or self._event.query()

    @cached_property
    def _read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()

    @property
    def loss(self) -> float:
        """Of the whole global step, nats, divided by the step's normaliser."""
        return self._read[0]

    @property
    def grad_norm(self) -> float:
        """Global L2 norm before clipping."""
        squared = self._read[1]
        return math.sqrt(squared) if squared >= 0 else math.nan

    @property
    def applied(self) -> bool:
        """False when loss or norm was not finite or above its limit, and then nothing
        was updated.
        """
        return self._read[2] == 0


class Limits(NamedTuple):
    """What a step's loss and gradient norm must not exceed to be applied."""

    loss: float = math.inf
    grad_norm: float = math.inf


NO_LIMITS = Limits()


@dataclass(frozen=True)
class ParallelRank:
    """Where this process stands.

    Attributes:
        rank, world_size: among all processes.
        data_rank, data_size: among the replicas; each reads its own micro-batches.
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
    """Owns model, optimizer and their state on all ranks. Every method is collective."""

    place: ParallelRank
    device: torch.device

    def prepare(self, batch: Batch) -> Any:
        """What this rank needs of a micro-batch, ready for `train_step`; may be called in another
        thread. Not collective.
        """
        ...

    def train_step(
        self, batches: Sequence[Any], learning_rate: float, limits: Limits = NO_LIMITS
    ) -> StepResult:
        """Forward and backward over this replica's micro-batches, then one optimizer update; none
        when it is not within the limits.

        The micro-batches may come from `prepare` or be whole batches.
        """
        ...

    def evaluate(self, batches: Sequence[Any], num_segments: int) -> torch.Tensor:
        """sum(weights * loss) of every segment id over all replicas, float64 [num_segments] on CPU,
        on every rank.
        """
        ...

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        ...

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag whether it is set on any rank, in one exchange."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, on every rank."""
        ...

    def start_save(self, folder: Path) -> PendingSave:
        """Start to write model and optimizer into an existing empty folder; returns once later
        steps cannot change what it holds.
        """
        ...

    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Read what `save` wrote, on any layout; without `optimizer` the weights alone."""
        ...

    def load_canonical(self, source: Weights) -> None:
        """Take the weights from canonical tensors; the optimizer starts afresh."""
        ...

    def peak_memory_gb(self) -> float:
        """Largest memory use of this rank so far, GB (GPU memory; on CPU the process)."""
        ...

    def close(self) -> None:
        """Leave the process groups."""
        ...
