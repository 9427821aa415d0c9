"""Kernels from a vocabulary-parallel shard of the logits to a loss per position. An objective names
the one it needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel

TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] with the softmax over all tensor-parallel shards, in fp32.

    Args:
        logits: this rank's columns, [n, vocabulary / tensor]; may be overwritten.
        targets: [n] int64, ids of the whole vocabulary.

    Returns:
        fp32 [n], nats.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        # the same in fewer passes over the logits
        return F.cross_entropy(logits.float(), targets, reduction="none")
    return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), targets)


KERNELS: dict[str, TokenLoss] = {"cross_entropy": cross_entropy}
