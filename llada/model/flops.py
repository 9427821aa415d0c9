"""Floating-point operations of a training step, and the peak they are compared with.

Convention: a multiply-add is two operations; backward costs twice the forward; attention is not causal and is counted from the
actual segment lengths; the head is counted where it is computed. Norms, rotations, softmax and the optimizer are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llada.settings import ModelSection

# Dense bf16 peaks of the vendors' data sheets, FLOP/s, by a part of the device name; the more specific name first.
_PEAKS_BF16 = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("GH200", 989.4e12),
    ("H800", 989.4e12),
    ("B200", 2250e12),
    ("A100", 311.9e12),
    ("A800", 311.9e12),
    ("L40S", 362e12),
)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over all ranks.

    Attributes:
        actual: attention within segments, head on the predicted positions.
        full_length: as if every row were one segment and the head ran on every position.
        causal_style: full_length with half the attention, as trainers of causal models report it.
    """

    actual: float
    full_length: float
    causal_style: float


def step_flops(model: ModelSection, lengths: Iterable[float], predicted: float, sequence_length: int) -> StepFlops:
    """FLOPs of forward and backward.

    Args:
        model: shape of the model.
        lengths: tokens of every attention segment of the step.
        predicted: positions with a head and a loss.
        sequence_length: tokens per row, for the full-length figure.
    """
    d, ff, kv = model.hidden_size, model.ffn_hidden_size, model.kv_heads * model.head_dim
    lengths = list(lengths)
    tokens = sum(lengths)
    matrices = 2 * model.num_layers * (2 * d * d + 2 * d * kv + 3 * d * ff)
    attention = 4 * model.num_layers * d
    head = 2 * d * model.vocab_size
    actual = matrices * tokens + attention * sum(n * n for n in lengths) + head * predicted
    full, causal = ((matrices + share * attention * sequence_length + head) * tokens for share in (1.0, 0.5))
    return StepFlops(3.0 * actual, 3.0 * full, 3.0 * causal)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s of one device and where the figure comes from: the data sheet for bf16 on a known GPU, else a measured
    matrix product (on CPU of all threads of this process)."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAKS_BF16:
            if part in name:
                return peak, "data sheet"
    return measured_matmul(device, dtype), "measured matrix product"


def measured_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of 20, or of as many as fit into two seconds (bf16 is slow on many CPUs)."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    best, begun = float("inf"), time.perf_counter()
    for _ in range(20):  # the best of many: another process may take a core for a while
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > 2:
            break
    return 2 * n**3 / best
