"""Kernels from a vocabulary-parallel shard of the logits to a loss per position.

An objective names the kernel that it needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel

TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [n, vocabulary / tensor ranks], targets [n]) -> losses fp32 [n]."""


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target], with the softmax over all tensor-parallel shards, in fp32.

    Args:
        logits: This rank's columns, [n, vocabulary / tensor ranks]. May be overwritten.
        targets: int64 [n], ids of the whole vocabulary.

    Returns:
        fp32 [n], in nats.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        # The same result in fewer passes over the logits.
        return F.cross_entropy(logits.float(), targets, reduction="none")
    return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), targets)


KERNELS: dict[str, TokenLoss] = {"cross_entropy": cross_entropy}
