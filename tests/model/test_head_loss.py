"""The head and the loss in chunks, against all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llada.model.head_loss import Head
from llada.model.vocabulary import WholeVocabulary
from llada.objectives.losses import cross_entropy
from tests.model.head_losses import IDS, LOSSES, WIDTH, inputs, plain


def head(name: str, chunk: int) -> Head:
    return Head(LOSSES[name], WholeVocabulary(), False, chunk * IDS)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_losses_and_gradients_are_those_of_all_logits_at_once(name: str, chunk: int) -> None:
    states, weight, terms = inputs(20)
    expected = plain(name, states, weight, terms, 5.0)
    own = head(name, chunk)
    losses = own.losses(states, weight, terms)
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-5, atol=1e-6)
    states.requires_grad_()
    weight.requires_grad_()
    loss = own.weighted_loss(states, weight, terms, 5.0)
    assert float(loss.detach()) == pytest.approx(float((expected[0] * terms.weights).sum() / 5))
    (2 * loss).backward()
    for leaf, gradient in zip((states, weight), expected[1:], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), 2 * gradient, rtol=1e-5, atol=1e-6)


def test_no_terms_give_a_loss_of_zero_and_zero_gradients() -> None:
    states, weight, terms = inputs(0)
    states.requires_grad_()
    weight.requires_grad_()
    loss = head("cross entropy", 4).weighted_loss(states, weight, terms, 5.0)
    loss.backward()
    assert loss.detach() == 0
    assert weight.grad is not None and not weight.grad.any()


def test_one_chunk_is_torchs_cross_entropy() -> None:
    """The loss to the last digit; the gradient is (softmax - 1) in another order of operations."""
    states, weight, terms = inputs(40)
    results = []
    for joined in (True, False):
        leaves = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
        if joined:
            loss = head("cross entropy", 64).weighted_loss(*leaves, terms, 7.0)
        else:
            logits = torch.nn.functional.linear(*leaves)
            losses = torch.nn.functional.cross_entropy(logits, terms.targets, reduction="none")
            loss = (losses * terms.weights).sum() / 7.0
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert torch.equal(results[0][0], results[1][0])
    for own, apart in zip(*results, strict=True):
        assert (own - apart).norm() <= 2e-7 * apart.norm()


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor with a column for each id."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # [WIDTH, IDS] is the transposed weight.
            if isinstance(leaf, torch.Tensor) and leaf.shape[1:] == (IDS,) and len(leaf) != WIDTH:
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("name", LOSSES)
def test_the_memory_of_the_logits_does_not_grow_with_the_terms(name: str) -> None:
    largest = []
    for count in (20, 200):
        states, weight, terms = inputs(count)
        states.requires_grad_()
        weight.requires_grad_()
        with _LargestTensor() as seen:
            head(name, 10).weighted_loss(states, weight, terms, 5.0).backward()
            head(name, 10).losses(states.detach(), weight.detach(), terms)
        largest.append(seen.elements)
    assert largest == [10 * IDS, 10 * IDS]


def test_a_bf16_head_adds_its_chunks_up_in_fp32() -> None:
    """Hundreds of chunks in bf16: rounded at each of them, the sum would be far off."""
    states, weight, terms = inputs(400)
    expected = plain("cross entropy", states.bfloat16(), weight.bfloat16(), terms, 5.0)
    leaves = [states.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()]
    own = Head(cross_entropy, WholeVocabulary(), False, IDS)
    own.weighted_loss(*leaves, terms, 5.0).backward()
    assert leaves[1].grad is not None and leaves[1].grad.dtype == torch.bfloat16
    error = (leaves[1].grad.double() - expected[2]).norm() / expected[2].norm()
    assert error < 0.01
