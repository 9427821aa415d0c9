"""Losses for tests of the head, and their plain computation from whole logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llada.objectives.losses import (
    CrossEntropyWithout,
    HeadTerms,
    Loss,
    Vocabulary,
    cross_entropy,
)

IDS = 48
WIDTH = 16
LEFT_OUT = {"cross entropy without an id": 30, "cross entropy without another id": 29}
"""Token ids that losses leave out of their softmax: the first and the last column of a rank of
eight; no targets.
"""


def entropy_and_aux(logits: torch.Tensor, terms: HeadTerms, vocabulary: Vocabulary) -> torch.Tensor:
    """Entropy of the prediction times the term's `aux`, plus the squared target logit.

    It reads probabilities after they were reduced, so its gradient is spread over the ranks.
    """
    log_p = logits - vocabulary.logsumexp(logits)[:, None]
    entropy = -vocabulary.sum(log_p.exp() * log_p)
    return entropy * terms.aux["factor"] + vocabulary.pick(logits, terms.targets).square()


def generic_cross_entropy(
    logits: torch.Tensor, terms: HeadTerms, vocabulary: Vocabulary
) -> torch.Tensor:
    """Cross entropy that is not recognized as such: it has no closed form."""
    return cross_entropy(logits, terms, vocabulary)


LOSSES: dict[str, Loss] = {
    "cross entropy": cross_entropy,
    "generic cross entropy": generic_cross_entropy,
    "entropy": entropy_and_aux,
    **{name: CrossEntropyWithout(id_) for name, id_ in LEFT_OUT.items()},
}


def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor, HeadTerms]:
    """States [count, WIDTH], weight [IDS, WIDTH] and terms; the same on every rank."""
    generator = torch.Generator().manual_seed(count)
    states = torch.randn(count, WIDTH, generator=generator)
    weight = torch.randn(IDS, WIDTH, generator=generator)
    targets = torch.randint(0, IDS, (count,), generator=generator)
    targets[torch.isin(targets, torch.tensor(list(LEFT_OUT.values())))] = 0
    terms = HeadTerms(
        indices=torch.arange(count),
        targets=targets,
        weights=torch.rand(count, generator=generator) + 0.1,
        groups=torch.zeros(count, dtype=torch.long),
        aux={"factor": torch.rand(count, generator=generator)},
    )
    return states, weight, terms


def plain(
    name: str, states: torch.Tensor, weight: torch.Tensor, terms: HeadTerms, normalizer: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, and the gradients of their weighted sum, from all logits at once in float64."""
    states = states.double().requires_grad_()
    weight = weight.double().requires_grad_()
    logits = states @ weight.t()
    if name == "entropy":
        p = logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        target = logits[torch.arange(len(logits)), terms.targets]
        losses = entropy * terms.aux["factor"] + target.square()
    else:
        if name in LEFT_OUT:
            kept = torch.arange(IDS) != LEFT_OUT[name]
            logits = logits.where(kept, -torch.inf)
        losses = F.cross_entropy(logits, terms.targets, reduction="none")
    ((losses * terms.weights).sum() / normalizer).backward()
    assert states.grad is not None and weight.grad is not None
    return losses.detach(), states.grad, weight.grad
