"""Bidirectional attention over segments, the one place that chooses a kernel.

In bf16 on a GPU, rows that are cut into segments need a variable-length kernel: flash-attn (4, 3 or
2, whichever is installed and made for the GPU), else torch's own. Rows of one segment go to
flash-attn too where it is the fastest, and else to torch's scaled dot product, which prefers cuDNN
on Hopper and newer. On CPU, and in fp32 on a GPU, torch's scaled dot product runs once per segment.
On a GPU the unfused math kernel is never used silently: it is refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llada.errors import RunError, UserError
from llada.objectives.base import Segments

Varlen = Callable[..., torch.Tensor]

_HOPPER = 9  # major compute capability


@dataclass(frozen=True)
class Kernel:
    """A variable-length flash attention kernel.

    Attributes:
        name: for people, and for the versions of a checkpoint.
        call: (q, k, v [tokens, heads, head_dim], cumulative lengths of queries and keys, longest of
            each) -> like q; fewer key than query heads are allowed.
        whole_rows: used for rows of one segment too; false: torch's scaled dot product, which has
            more kernels, computes them.
    """

    name: str
    call: Varlen
    whole_rows: bool

    def computes(self, layout: Segments) -> bool:
        """Whether this kernel, and not torch's scaled dot product, computes rows cut like these."""
        return self.whole_rows or not layout.whole()


@dataclass(frozen=True)
class SegmentLengths:
    """Where segments begin and end, as variable-length kernels want it: cumulative over the
    flattened tokens of a micro-batch.

    Rows with equal boundaries need no flattening: attention treats heads alike, so the rows are
    handed over as further heads of one row, which is a view of [s, b, h, d] tensors and not a copy.

    Attributes:
        queries, keys: cumulative lengths of the local queries and of all keys, int32 [segments +
        1].
        longest_query, longest_key: of a segment, tokens.
        rows_are_heads: the lengths are of one row, and hold for every row.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    rows_are_heads: bool


@dataclass(frozen=True)
class AttentionInputs:
    """What every attention layer of a micro-batch shares. Megatron-Core carries it as
    `packed_seq_params`.

    Attributes:
        layout: segments of the whole rows.
        offset: position of this rank's first query token (context parallelism), in tokens.
        cos, sin: rotary tables of this rank's tokens, fp32 [s, 1, 1, head_dim / 2].
        kernel: the variable-length kernel that computes it; None: torch's scaled dot product, per
            segment.
        lengths: for the kernel, on the device of the tensors.
    """

    layout: Segments
    offset: int
    cos: torch.Tensor
    sin: torch.Tensor
    kernel: Kernel | None = None
    lengths: SegmentLengths | None = None

    @property
    def qkv_format(self) -> str:
        """Read by Megatron-Core: tensors stay [s, b, h, d]."""
        return self.layout.qkv_format


def rotary_tables(
    positions: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary embedding (arXiv 2104.09864), fp32 [s, 1, 1, head_dim / 2].

    Args:
        positions: [s] integers.
        head_dim: even.
        theta: base.
    """
    frequencies = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    )
    angles = torch.outer(positions.float(), frequencies)[:, None, None, :]
    return angles.cos(), angles.sin()


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the opposite rotation: nothing but the tables is kept for the
    backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [s, b, h, d] in fp32 with the half-rotation convention (Llama, NeoX) and cast back."""
    return _Rotation.apply(x, cos, sin)


def segment_lengths(layout: Segments, offset: int, length: int) -> SegmentLengths:
    """Lengths of all segments, row by row, on CPU.

    Args:
        layout: segments of the whole rows, whose keys all ranks have.
        offset, length: the local queries are tokens [offset, offset + length) of every row. A
        segment without a local query has a
            query length of 0.
    """
    equal = len(set(layout.bounds)) == 1
    queries, keys = [], []
    for bounds in layout.bounds[:1] if equal else layout.bounds:
        for start, end in itertools.pairwise(bounds):
            queries.append(max(0, min(end, offset + length) - max(start, offset)))
            keys.append(end - start)
    return SegmentLengths(
        _cumulative(queries), _cumulative(keys), max(queries), max(keys), rows_are_heads=equal
    )


def _cumulative(lengths: list[int]) -> torch.Tensor:
    """0 and the running sums, int32 [n + 1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def attention_inputs(
    layout: Segments,
    positions: torch.Tensor,
    offset: int,
    head_dim: int,
    theta: float,
    kernel: Kernel | None = None,
    lengths: SegmentLengths | None = None,
) -> AttentionInputs:
    """Prepare what the layers of one micro-batch share.

    Args:
        layout: segments of the whole rows.
        positions: this rank's rotary positions [s], on the device.
        offset: index of this rank's first token in the row.
        head_dim, theta: of the rotary embedding.
        kernel, lengths: a variable-length kernel and, on the device, the lengths for it; without
        lengths torch's scaled dot product
            computes this micro-batch.
    """
    cos, sin = rotary_tables(positions, head_dim, theta)
    return AttentionInputs(
        layout, offset, cos, sin, kernel if lengths is not None else None, lengths
    )


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scaled dot product of [s, b, h, d] tensors, no mask; never the math kernel on a GPU."""
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    with fused_kernels_only() if q.is_cuda else contextlib.nullcontext():
        try:
            out = F.scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise RunError(
                f"attention: no fused kernel on this GPU for {q.dtype}, head dimension"
                f" {q.shape[-1]}; the math kernel is refused"
            ) from None
    return out.permute(2, 0, 1, 3)


def fused_kernels_only() -> contextlib.AbstractContextManager[None]:
    """Restrict torch's scaled dot product attention to its fused kernels, and on Hopper and newer
    prefer cuDNN's, the fastest there.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= _HOPPER:
        fused = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ]
    return sdpa_kernel(fused, set_priority=True)


def segmented_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: AttentionInputs
) -> torch.Tensor:
    """Attention per segment: q [s, b, h, d] are this rank's tokens, k and v [L, b, g, d] the whole
    rows. Rows with equal boundaries are computed together.
    """
    if inputs.layout.whole():
        return _sdpa(q, k, v)
    first, last = inputs.offset, inputs.offset + len(q)
    outputs, order = [], []
    for bounds, rows in inputs.layout.groups().items():
        parts = []
        for start, end in itertools.pairwise(bounds):
            low, high = max(start, first), min(end, last)
            if low < high:
                parts.append(
                    _sdpa(
                        q[low - first : high - first, rows], k[start:end, rows], v[start:end, rows]
                    )
                )
        outputs.append(torch.cat(parts))
        order.extend(rows)
    back = torch.tensor(order, device=q.device).argsort()
    return torch.cat(outputs, dim=1)[:, back]


_FLASH_ATTN = (
    ("flash-attn 4", "flash_attn.cute", (10, 11)),
    ("flash-attn 3", "flash_attn_interface", (9, 9)),
    ("flash-attn 2", "flash_attn", (8, 99)),
)
"""Name, module, and the first and last major compute capability whose GPUs it is made for; its
kernels fail on others.
"""


def installed_kernels(capability: int) -> list[Kernel]:
    """The variable-length flash kernels for bf16 on a GPU of this major compute capability, the
    fastest first.
    """
    found = []
    for name, module, (first, last) in _FLASH_ATTN:
        if not first <= capability <= last:
            continue
        try:
            function = importlib.import_module(module).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        # On Hopper and newer cuDNN, behind torch's scaled dot product, beats flash-attn 2, which
        # was written for Ampere.
        whole_rows = name != "flash-attn 2" or capability < _HOPPER
        found.append(Kernel(name, functools.partial(_call_flash_attn, function), whole_rows))
    with contextlib.suppress(ImportError, AttributeError):
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        # else every query head needs keys of its own
        shares_keys = "enable_gqa" in inspect.signature(function).parameters
        found.append(
            Kernel(
                "torch varlen",
                functools.partial(_call_torch_varlen, function, shares_keys),
                whole_rows=False,
            )
        )
    return found


@functools.cache
def varlen_kernel(capability: int) -> Kernel | None:
    """The one of `installed_kernels` that runs use; None when there is none."""
    return next(iter(installed_kernels(capability)), None)


def kernel_name() -> str:
    """What computes attention in bf16 on this machine's GPU."""
    found = varlen_kernel(torch.cuda.get_device_capability()[0])
    return found.name if found else "torch scaled dot product"


def _call_flash_attn(
    function: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> torch.Tensor:
    more = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        causal=False,
        **more,
    )
    return out[0] if isinstance(out, tuple) else out


def _call_torch_varlen(
    function: Any,
    shares_keys: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> torch.Tensor:
    grouped = k.shape[1] != q.shape[1]
    if grouped and not shares_keys:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    more = {"enable_gqa": True} if grouped and shares_keys else {}
    return function(q, k, v, cu_q, cu_k, max_q, max_k, **more)


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel | None:
    """The kernel of a run; None: torch's scaled dot product per segment (CPU, fp32).

    Raises:
        RunError: bf16 on a GPU without a variable-length kernel.
        UserError: a head dimension that flash kernels do not have.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return None
    if head_dim % 8 or head_dim > 256:
        raise UserError(
            f"model.hidden_size: the head dimension {head_dim} (hidden_size / num_attention_heads)"
            " must be a multiple of 8 and at most 256 for flash attention in bf16 on a GPU"
        )
    found = varlen_kernel(torch.cuda.get_device_capability(device)[0])
    if found is None:
        raise RunError(
            "attention: neither flash-attn nor torch's variable-length attention is installed;"
            " install the gpu extra"
        )
    return found


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: AttentionInputs
) -> torch.Tensor:
    """Attention of q [s, b, h, d] (this rank's tokens) to k, v [L, b, g, d] (whole rows) within
    segments; [s, b, h, d].
    """
    lengths = inputs.lengths
    if inputs.kernel is None or lengths is None:
        return segmented_sdpa(q, k, v, inputs)
    s, b = q.shape[:2]
    # [tokens, heads, d]. With r query heads a key head, query head i of row b is head b h + i here
    # and its key head (b h + i) // r = b g + i // r: that of the same row.
    flatten = _rows_as_heads if lengths.rows_are_heads else _rows_end_to_end
    out = inputs.kernel.call(
        flatten(q),
        flatten(k),
        flatten(v),
        lengths.queries,
        lengths.keys,
        lengths.longest_query,
        lengths.longest_key,
    )
    if lengths.rows_are_heads:
        return out.view(q.shape)
    return out.view(b, s, *q.shape[2:]).transpose(0, 1)


def _rows_as_heads(x: torch.Tensor) -> torch.Tensor:
    """[s, b, h, d] -> [s, b h, d], a view."""
    return x.flatten(1, 2)


def _rows_end_to_end(x: torch.Tensor) -> torch.Tensor:
    """[s, b, h, d] -> [b s, h, d], a copy."""
    return x.transpose(0, 1).flatten(0, 1)
