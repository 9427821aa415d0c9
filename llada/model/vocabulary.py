"""Reductions over a vocabulary whose columns are spread over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class WholeVocabulary:
    """`llada.objectives.losses.Vocabulary` of a single tensor rank, which has all columns."""

    def logsumexp(self, x: torch.Tensor) -> torch.Tensor:
        """Return log sum exp over the columns, [n]."""
        return x.logsumexp(dim=-1)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the columns, [n]."""
        return x.sum(dim=-1)

    def pick(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the column of each row's id, [n]."""
        return x.gather(1, ids[:, None])[:, 0]

    def exclude(self, x: torch.Tensor, id_: int) -> torch.Tensor:
        """Return x with -inf in the column of an id, [n, v]."""
        return _without_column(x, id_)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Return the largest value of each row, [n]."""
        return x.amax(dim=-1)

    def own_column(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the column of each id, and that it is here."""
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Return x: there is one rank."""
        return x


class ShardedVocabulary:
    """`llada.objectives.losses.Vocabulary` of one of several tensor ranks.

    Every rank computes the same losses from its own columns. A gradient is that of the mean of
    these copies: each sum over the ranks adds the gradients of all ranks up, and the factor 1 /
    `size` is the caller's. So a loss may use a reduced value in any way, for example in
    exp(logits - logsumexp), whose gradient is spread over the ranks.

    Args:
        group: the tensor ranks.
        first: id of this rank's first column.
        columns: number of this rank's columns.
    """

    def __init__(self, group: dist.ProcessGroup, first: int, columns: int) -> None:
        self.group = group
        self.first = first
        self.columns = columns

    @property
    def size(self) -> int:
        """Number of tensor ranks."""
        return self.group.size()

    def logsumexp(self, x: torch.Tensor) -> torch.Tensor:
        """Return log sum exp over the columns of all ranks, [n]."""
        largest = self.largest(x.detach())
        return largest + self.sum((x - largest[:, None]).exp()).log()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the columns of all ranks, [n]."""
        return _SumOverRanks.apply(x.sum(dim=-1), self.group)

    def pick(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the column of each row's id, [n]; one rank has it."""
        column, is_own = self.own_column(ids)
        picked = x.gather(1, column[:, None])[:, 0]
        # Not a product: the column of another rank's id may be -inf, and 0 x -inf is NaN.
        return _SumOverRanks.apply(picked.where(is_own, 0.0), self.group)

    def exclude(self, x: torch.Tensor, id_: int) -> torch.Tensor:
        """Return x with -inf in the column of an id, [n, v]; one rank has it."""
        if self.first <= id_ < self.first + self.columns:
            return _without_column(x, id_ - self.first)
        return x

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Return the largest value of each row over the columns of all ranks, [n]."""
        largest = x.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest

    def over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Add x up over the ranks, in place and without gradients."""
        dist.all_reduce(x, group=self.group)
        return x

    def own_column(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the local column of each id, 0 if another rank has it, and whether it is own."""
        column = ids - self.first
        is_own = (column >= 0) & (column < self.columns)
        return column * is_own, is_own


def _without_column(x: torch.Tensor, column: int) -> torch.Tensor:
    index = torch.full((1,), column, device=x.device)
    return x.index_fill(1, index, -torch.inf)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
