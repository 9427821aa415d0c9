"""The interface of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from llada.arrays import F64, I64
from llada.objectives.corrupted import Corrupted
from llada.objectives.losses import Loss
from llada.objectives.row import Key, NoiseGroups, Row


@dataclass(frozen=True)
class Work:
    """What the model computes for a step, known before anything is drawn; for counting FLOPs.

    Attributes:
        inputs: tokens that the model reads.
        terms: expected number of terms of the loss, by head.
        attended_pairs: pairs of a query and a key that it sees.
    """

    inputs: int
    terms: Mapping[str, float]
    attended_pairs: float


class Objective(Protocol):
    """From clean tokens and keys to corrupted tokens and the terms of the loss.

    An objective knows neither ranks nor the model, and holds no state: what it returns follows from
    its arguments alone.
    """

    @property
    def losses(self) -> Mapping[str, Loss]:
        """The loss of a term, by head."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether the sum of the losses is -log p itself, whatever the times and the draws."""
        ...

    @property
    def pads_responses(self) -> bool:
        """Whether fine-tuning pads responses with EOS, and trains on the padding.

        A model that writes all positions at once learns from it where a text ends. One that writes
        from left to right stops at the first EOS.
        """
        ...

    def input_length(self, length: int) -> int:
        """Return how many tokens the model reads of a row of `length` tokens."""
        ...

    @property
    def summary(self) -> str:
        """Name and settings in a few words, for people."""
        ...

    def draw_t(self, seed: int, step: int, shares: F64) -> F64:
        """Draw the diffusion time of each noise group of a training step, float64 [g] in [0, 1).

        Args:
            seed: of the run.
            step: number of the step.
            shares: share of each group in the loss of the step, in any unit [g].
        """
        ...

    def groups(self, spans: I64) -> tuple[I64, I64]:
        """Divide the parts of a step that may be corrupted into noise groups.

        The t of a group is drawn afterwards. The parts of a whole step come at once, because there
        may be millions of groups.

        Args:
            spans: first and past-the-last position in its row of the part of each attention segment
                that may be corrupted, int64 [n, 2].

        Returns:
            The span of each group, int64 [g, 2], and the part that it lies in, int64 [g], in order.
        """
        ...

    def corrupt(self, row: Row, key: Key) -> Corrupted:
        """Corrupt one row; every draw is a function of the key, its sample and its position."""
        ...

    def bound(self) -> Objective:
        """Return the objective whose expected sum is at least -log p of the clean tokens.

        Validation and evaluation measure that one.
        """
        ...

    def work(self, segment_lengths: I64, groups: NoiseGroups) -> Work:
        """Return what the model computes for a step.

        Args:
            segment_lengths: tokens of each attention segment [n].
            groups: all noise groups of the step.
        """
        ...
