"""Floating-point operations of a training step, and the peak rate of a device.

Convention: a multiply-add is two operations; the backward pass costs twice the forward pass;
attention is counted by the pairs of a query and a key that it sees; the head is counted at the
positions where it is computed. Norms, rotary embeddings, softmax and optimizer are not counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from llada.config.sections import ModelSection
from llada.objectives import TOKENS, Work

# Dense bf16 peaks of the vendors' data sheets, in FLOP/s, by a part of the device name. The first
# match counts, so the more specific name comes first.
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
        actual: Attention within segments, head on the predicted positions.
        full_length: As if every row were one segment and the head ran on every position.
        causal_style: full_length with half the attention, as trainers of causal models report it.
    """

    actual: float
    full_length: float
    causal_style: float


def step_flops(model: ModelSection, work: Work, row_length: int) -> StepFlops:
    """FLOPs of the forward and backward pass.

    Args:
        model: Shape of the model.
        work: Tokens that are read, attended pairs, and positions with a head and a loss.
        row_length: Tokens that are read of a whole row, for the full-length figures.
    """
    d = model.hidden_size
    ff = model.ffn_hidden_size
    kv = model.kv_heads * model.head_dim
    # Per token: the query and output projections (d x d each), keys and values (d x kv each), and
    # the three matrices of the SwiGLU (d x ff each).
    matrices = 2 * model.num_layers * (2 * d * d + 2 * d * kv + 3 * d * ff)
    # Per pair of tokens: q k^T and the weighted sum of v, each 2 d operations.
    attention = 4 * model.num_layers * d
    # Per predicted position.
    head = 2 * d * model.vocab_size
    actual = matrices * work.inputs + attention * work.attended_pairs + head * work.terms[TOKENS]
    full = (matrices + 1.0 * attention * row_length + head) * work.inputs
    causal = (matrices + 0.5 * attention * row_length + head) * work.inputs
    # The backward pass costs twice the forward pass.
    return StepFlops(3.0 * actual, 3.0 * full, 3.0 * causal)


class Peak:
    """The rate that one device can reach, the denominator of the MFU.

    Args:
        device: Of this rank.
        dtype: Of the matrix products.

    Attributes:
        flops: The peak, in FLOP/s.
        source: "data sheet" for bf16 on a known GPU, else "measured matrix product": the best of
            many (on CPU over all threads of this process).
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        listed = None
        if device.type == "cuda" and dtype == torch.bfloat16:
            listed = _data_sheet(torch.cuda.get_device_name(device))
        if listed is not None:
            self.source = "data sheet"
            self.flops = listed
        else:
            self.source = "measured matrix product"
            self.flops = measured_matmul(device, dtype)
        self._measured_at = time.perf_counter()

    def mfu(self, rate: float) -> float:
        """Model FLOPs utilization: `rate`, in FLOP/s of one device, over the peak.

        A measured peak below the rate was disturbed by other work on the machine. It is measured
        again, and the rate itself is a lower bound of it.
        """
        if rate > self.flops and self.source != "data sheet":
            self._measure_again(0.5)
            self.flops = max(rate, self.flops)
        return rate / self.flops

    def refresh(self, share: float = 0.01) -> None:
        """Measure again for `share` of the time since the last measurement; keep the better one.

        A data sheet's figure stays.
        """
        if self.source != "data sheet":
            self._measure_again(share * (time.perf_counter() - self._measured_at))

    def _measure_again(self, seconds: float) -> None:
        # Not on a GPU: its memory is full by now, and no other work disturbed the first one.
        if self._device.type == "cpu":
            self.flops = max(self.flops, measured_matmul(self._device, self._dtype, seconds))
        self._measured_at = time.perf_counter()


def _data_sheet(name: str) -> float | None:
    """The bf16 peak of a GPU by its device name, or None if it is not listed."""
    for part, peak in _PEAKS_BF16:
        if part in name:
            return peak
    return None


def measured_matmul(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Measure the rate of a large matrix product, in FLOP/s.

    It is the best of many products, because other processes may take a core for a while. The
    measurement ends after `seconds`, or once 20 products in a row were not 1 % faster than the best
    before them.
    """
    # On a CPU larger matrices are no faster.
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    since_best = 0
    begun = time.perf_counter()
    while since_best < 20:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.perf_counter()
        took = end - start
        since_best += 1
        if took < 0.99 * best:
            since_best = 0
        best = min(best, took)
        if end - begun > seconds:
            break
    return 2 * n**3 / best
