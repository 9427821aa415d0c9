"""Floating-point operations of a training step, and the peak they are compared with.

Convention: a multiply-add is two operations; backward costs twice the forward; attention is not
causal and is counted from the actual segment lengths; the head is counted where it is computed.
Norms, rotations, softmax and the optimizer are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llada.config.sections import ModelSection

# Dense bf16 peaks of the vendors' data sheets, FLOP/s, by a part of the device name; the more
# specific name first.
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


def step_flops(
    model: ModelSection, lengths: Iterable[float], predicted: float, sequence_length: int
) -> StepFlops:
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
    full, causal = (
        (matrices + share * attention * sequence_length + head) * tokens for share in (1.0, 0.5)
    )
    return StepFlops(3.0 * actual, 3.0 * full, 3.0 * causal)


class Peak:
    """FLOP/s that one device can reach, which a step's are compared with.

    Args:
        device: of this rank.
        dtype: of the matrix products.

    Attributes:
        flops: the peak, FLOP/s.
        source: where it comes from: the data sheet for bf16 on a known GPU, else the best of many
            measured matrix products (on CPU over all threads of this process).
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        listed = (
            _data_sheet(torch.cuda.get_device_name(device))
            if device.type == "cuda" and dtype == torch.bfloat16
            else None
        )
        self.source = "measured matrix product" if listed is None else "data sheet"
        self.flops = measured_matmul(device, dtype) if listed is None else listed
        self._measured_at = time.perf_counter()

    def mfu(self, rate: float) -> float:
        """The share of the peak that `rate` FLOP/s of one device are.

        A measured peak below the rate was measured beside other work. It is measured again, and the
        rate itself bounds it from below.
        """
        if rate > self.flops and self.source != "data sheet":
            self._measure_again(0.5)
            self.flops = max(rate, self.flops)
        return rate / self.flops

    def refresh(self, share: float = 0.01) -> None:
        """Spend `share` of the time since the last measurement on another one and keep the better;
        a data sheet's figure stays.
        """
        if self.source != "data sheet":
            self._measure_again(share * (time.perf_counter() - self._measured_at))

    def _measure_again(self, seconds: float) -> None:
        if self._device.type == "cpu":  # a GPU's memory is full by now, and no other work is on it
            self.flops = max(self.flops, measured_matmul(self._device, self._dtype, seconds))
        self._measured_at = time.perf_counter()


def _data_sheet(name: str) -> float | None:
    """The bf16 peak of a GPU by its device name; None: not listed."""
    return next((peak for part, peak in _PEAKS_BF16 if part in name), None)


def measured_matmul(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of a large matrix product: the best of many, since another process may take a core for
    a while.

    On a CPU matrices of 512 x 512 suffice: larger ones are no faster. Ends after `seconds`, or
    earlier once 20 products in a row were not 1 % better than the best before them.
    """
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=dtype)
    best, since_best, begun = float("inf"), 0, time.perf_counter()
    while since_best < 20:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.perf_counter()
        since_best = 0 if end - start < 0.99 * best else since_best + 1
        best = min(best, end - start)
        if end - begun > seconds:
            break
    return 2 * n**3 / best
