"""Losses of terms: pure functions from logits and terms, on the device.

A loss sees the logits of some terms at once and of this tensor-parallel rank's part of the
vocabulary only; what needs the whole vocabulary goes through a `Vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from llada.objectives.corrupted import TOKENS


@dataclass(frozen=True)
class HeadTerms:
    """The terms of the loss of one micro-batch that this rank computes, for one head.

    Attributes:
        indices: where each term reads the hidden states, as a row of them flattened to [s b, d],
            int64 [n].
        targets: the token id that each term is about, int64 [n].
        weights: factor on the loss of each term, float32 [n].
        groups: number in the step of the noise group of each term, int64 [n].
        aux: whatever else the loss needs of each term, by name, [n] each.
    """

    indices: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    groups: torch.Tensor
    aux: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.indices)

    def map_on_device(self, change: Callable[[torch.Tensor], torch.Tensor]) -> HeadTerms:
        """Return terms with all tensors changed that the loss needs; not the groups."""
        return HeadTerms(
            indices=change(self.indices),
            targets=change(self.targets),
            weights=change(self.weights),
            # Only a validation adds the losses up by group, and copies these itself.
            groups=self.groups,
            aux={name: change(values) for name, values in self.aux.items()},
        )


class Vocabulary(Protocol):
    """Differentiable reductions over the vocabulary, of which each tensor rank has some columns."""

    def logsumexp(self, x: torch.Tensor) -> torch.Tensor:
        """Return log sum exp over all columns: [n, vocabulary / tensor ranks] -> [n]."""
        ...

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over all columns: [n, vocabulary / tensor ranks] -> [n]."""
        ...

    def pick(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the column of each row's id: [n, vocabulary / tensor ranks], int64 [n] -> [n]."""
        ...

    def exclude(self, x: torch.Tensor, id_: int) -> torch.Tensor:
        """Return x with -inf in the column of an id, the same shape."""
        ...


Loss = Callable[[torch.Tensor, HeadTerms, Vocabulary], torch.Tensor]
"""(logits fp32 [n, vocabulary / tensor ranks], their n terms, vocabulary) -> losses fp32 [n]."""


def cross_entropy(logits: torch.Tensor, terms: HeadTerms, vocabulary: Vocabulary) -> torch.Tensor:
    """-log softmax(logits)[target], in nats; the arguments are those of `Loss`."""
    return vocabulary.logsumexp(logits) - vocabulary.pick(logits, terms.targets)


@dataclass(frozen=True)
class CrossEntropyWithout:
    """Cross entropy of a softmax that leaves one id out, as if its logit were -inf.

    Attributes:
        excluded: the token id; no target.
    """

    excluded: int

    def __call__(
        self, logits: torch.Tensor, terms: HeadTerms, vocabulary: Vocabulary
    ) -> torch.Tensor:
        """Return the losses; the arguments are those of `Loss`."""
        return cross_entropy(vocabulary.exclude(logits, self.excluded), terms, vocabulary)


CROSS_ENTROPY: Mapping[str, Loss] = {TOKENS: cross_entropy}
"""Losses by head of an objective that only predicts clean tokens."""
