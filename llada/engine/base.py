"""What the training loop needs from an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llada.objectives.base import Batch


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        loss: of the whole global step, nats, divided by the step's normaliser.
        grad_norm: global L2 norm before clipping.
        applied: false when loss or norm was not finite, and then nothing was updated.
    """

    loss: float
    grad_norm: float
    applied: bool


@dataclass(frozen=True)
class Place:
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


class PendingSave(Protocol):
    """A save in progress on this rank.

    Attributes:
        error: what went wrong, once done.
        files: {"bytes", "xxh3"} of every file this rank wrote, by name, once done.
    """

    error: BaseException | None
    files: dict[str, dict[str, Any]]

    def done(self) -> bool:
        """Whether this rank has written its files."""
        ...

    def wait(self) -> None:
        """Until done."""
        ...

    def finish(self) -> None:
        """Write what belongs to all ranks; collective, after every rank is done without an error."""
        ...


class Engine(Protocol):
    """Owns model, optimizer and their state on all ranks. Every method is collective."""

    place: Place
    device: torch.device

    def train_step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Forward and backward over this replica's micro-batches, then one optimizer update."""
        ...

    def evaluate(self, batches: Sequence[Batch], num_segments: int) -> torch.Tensor:
        """sum(weights * loss) of every segment id over all replicas, float64 [num_segments] on CPU, on every rank."""
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
        """Start to write model and optimizer into an existing empty folder; returns once later steps cannot change what it holds."""
        ...

    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Read what `save` wrote, on any layout; without `optimizer` the weights alone."""
        ...

    def peak_memory_gb(self) -> float:
        """Largest memory use of this rank so far, GB (GPU memory; on CPU the process)."""
        ...

    def close(self) -> None:
        """Leave the process groups."""
        ...
