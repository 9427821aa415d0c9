"""The head and the loss with the vocabulary spread over eight tensor ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from llada.model.head_loss import Head
from llada.model.vocabulary import ShardedVocabulary
from tests.distributed.pool import RankPool
from tests.model.head_losses import IDS, LOSSES, inputs, plain


def on_rank(name: str, reduces_gradient: bool) -> list[torch.Tensor]:
    """Losses, loss, gradient of the states and of this rank's part of the weight."""
    group = dist.group.WORLD
    assert group is not None
    columns = IDS // group.size()
    first = group.rank() * columns
    states, weight, terms = inputs(20)
    own = weight[first : first + columns].clone().requires_grad_()
    states.requires_grad_()
    head = Head(
        LOSSES[name], ShardedVocabulary(group, first, columns), reduces_gradient, 7 * columns
    )
    losses = head.losses(states.detach(), own.detach(), terms)
    loss = head.weighted_loss(states, own, terms, 5.0)
    loss.backward()
    assert states.grad is not None and own.grad is not None
    return [losses, loss.detach(), states.grad, own.grad]


@pytest.mark.parametrize("reduces_gradient", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_one_rank(
    name: str, reduces_gradient: bool, pool: RankPool
) -> None:
    losses, to_states, to_weight = plain(name, *inputs(20), 5.0)
    answers = pool.run(on_rank, name, reduces_gradient)
    for answer in answers:
        torch.testing.assert_close(answer[0].double(), losses, rtol=1e-5, atol=1e-6)
    if reduces_gradient:
        of_states = [answer[2] for answer in answers]
    else:
        # What gathered the states adds up the parts of all ranks.
        of_states = [torch.stack([answer[2] for answer in answers]).sum(0)]
    for gradient in of_states:
        torch.testing.assert_close(gradient.double(), to_states, rtol=1e-5, atol=1e-6)
    of_weight = torch.cat([answer[3] for answer in answers])
    torch.testing.assert_close(of_weight.double(), to_weight, rtol=1e-5, atol=1e-6)
