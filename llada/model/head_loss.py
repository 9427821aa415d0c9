"""The head and the loss as one operation, computed in chunks of terms.

The terms of a loss are independent of each other, and their weights are known before the step. So
the logits of a chunk can be turned into the chunk's losses and gradients at once, and are gone
before those of the next chunk are made: the memory of logits is that of one chunk, however many
terms there are.

Shapes in this file: n terms, d hidden size, v columns of this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llada.model.vocabulary import ShardedVocabulary, WholeVocabulary
from llada.objectives.losses import CrossEntropyWithout, HeadTerms, Loss, cross_entropy

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Largest number of logits of a chunk, by type of the device; 4 bytes each.

At 32,768 ids a chunk has 512 terms on a CPU, where it should stay in the caches, and 8,192 on a
GPU, where a matrix product needs some thousands of rows to be fast. A small model has one chunk.
"""


@dataclass(frozen=True)
class Head:
    """How a head's loss is computed on this rank.

    Attributes:
        loss: of a term.
        vocabulary: this rank's part of it.
        reduces_gradient: add up the gradient of the states over the tensor ranks here. False: what
            gathered the states does it (sequence parallelism).
        chunk_elements: largest number of logits of a chunk.
    """

    loss: Loss
    vocabulary: WholeVocabulary | ShardedVocabulary
    reduces_gradient: bool
    chunk_elements: int

    def losses(self, states: torch.Tensor, weight: torch.Tensor, terms: HeadTerms) -> torch.Tensor:
        """Return the loss of each term, fp32 [n], without gradients.

        Args:
            states: hidden state that each term reads, [n, d].
            weight: of the head, [v, d].
            terms: of the loss.
        """
        losses = torch.empty(len(terms), dtype=torch.float32, device=states.device)
        with torch.no_grad():
            for chunk, logits in self._chunks_with_logits(states, weight, terms):
                losses[chunk] = self.loss(logits, _part(terms, chunk), self.vocabulary)
        return losses

    def weighted_loss(
        self, states: torch.Tensor, weight: torch.Tensor, terms: HeadTerms, normalizer: float
    ) -> torch.Tensor:
        """Return sum(weights * losses) / normalizer, fp32 [], with gradients.

        The arguments are those of `losses`.
        """
        total: torch.Tensor = _WeightedLoss.apply(states, weight, terms, normalizer, self)
        return total

    def _chunks_with_logits(
        self, states: torch.Tensor, weight: torch.Tensor, terms: HeadTerms
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield each chunk of terms with its logits, fp32 [n, v], valid until the next chunk."""
        size = max(1, self.chunk_elements // len(weight))
        # One buffer for all chunks: on a CPU, fresh memory costs as much as the softmax.
        buffer = states.new_empty(min(size, len(terms)), len(weight))
        for first in range(0, len(terms), size):
            chunk = slice(first, first + size)
            logits = buffer[: len(states[chunk])]
            torch.mm(states[chunk], weight.t(), out=logits)
            yield chunk, logits.float()

    def loss_and_gradient(
        self, logits: torch.Tensor, terms: HeadTerms, factors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of a chunk, and the gradient of sum(factors * losses) by its logits.

        Args:
            logits: fp32 [n, v]; overwritten.
            terms: of the chunk.
            factors: fp32 [n].
        """
        # Both cross entropies have a closed form, without autograd's copies of the logits.
        is_cross_entropy = self.loss is cross_entropy
        if isinstance(self.loss, CrossEntropyWithout):
            logits = self.vocabulary.exclude(logits, self.loss.excluded)
            is_cross_entropy = True
        if is_cross_entropy:
            return _cross_entropy(logits, terms.targets, factors, self.vocabulary)
        if isinstance(self.vocabulary, ShardedVocabulary):
            # Every rank has a copy of the losses, and the gradient is that of their mean.
            factors = factors / self.vocabulary.size
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            losses = self.loss(logits, terms, self.vocabulary)
            (gradient,) = torch.autograd.grad((losses * factors).sum(), logits)
        return losses.detach(), gradient


class _WeightedLoss(torch.autograd.Function):
    """The loss and, already in the forward pass, its gradients by the states and the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        terms: HeadTerms,
        normalizer: float,
        head: Head,
    ) -> torch.Tensor:
        # Rounded to fp32 as on the device, but on the host: a copy to the device would wait for it.
        reciprocal = (1 / torch.tensor(normalizer, dtype=torch.float32)).item()
        factors = terms.weights * reciprocal
        losses = torch.empty_like(terms.weights)
        to_states = torch.empty_like(states)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk, logits in head._chunks_with_logits(states, weight, terms):
            part = _part(terms, chunk)
            losses[chunk], gradient = head.loss_and_gradient(logits, part, factors[chunk])
            gradient = gradient.to(states.dtype)
            torch.matmul(gradient, weight, out=to_states[chunk])
            _add_product(to_weight, gradient.t(), states[chunk])
        if head.reduces_gradient:
            assert isinstance(head.vocabulary, ShardedVocabulary)
            dist.all_reduce(to_states, group=head.vocabulary.group)
        ctx.save_for_backward(to_states, to_weight.to(weight.dtype))
        return (losses * terms.weights).sum() / normalizer

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        to_states, to_weight = ctx.saved_tensors
        # In place, because they are as large as the head. A second backward pass is refused by
        # torch, which notices that saved tensors have changed.
        return to_states.mul_(upstream), to_weight.mul_(upstream), None, None, None


def _part(terms: HeadTerms, chunk: slice) -> HeadTerms:
    return terms.map_on_device(lambda values: values[chunk])


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to a total in fp32.

    In bf16 each product is rounded once, as the whole would be without chunks; their sum is not.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    factors: torch.Tensor,
    vocabulary: WholeVocabulary | ShardedVocabulary,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy in closed form: d loss / d logit = softmax - 1 at the target.

    Overwrites the logits by their gradient.
    """
    logits -= vocabulary.largest(logits)[:, None]
    column, is_own = vocabulary.own_column(targets)
    at_target = logits.gather(1, column[:, None])[:, 0] * is_own
    exponentials = logits.exp_()
    # Both sums in one message: of the exponentials and, from the rank that has it, of the target.
    sums = torch.stack([exponentials.sum(dim=-1), at_target])
    normalizers, at_target = vocabulary.over_ranks(sums)
    losses = normalizers.log() - at_target
    gradient = exponentials.mul_((factors / normalizers)[:, None])
    gradient.scatter_add_(1, column[:, None], (-factors * is_own)[:, None])
    return losses, gradient
