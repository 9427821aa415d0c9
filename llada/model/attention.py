"""Attention over segments, bidirectional or causal; the one place that chooses a kernel.

- bf16 on a GPU, rows cut into segments: a variable-length kernel. flash-attn 4, 3 or 2 if one is
  installed that is made for the GPU, else torch's own.
- bf16 on a GPU, rows of one segment: flash-attn where it is the fastest, else torch's scaled dot
  product attention, which prefers cuDNN on Hopper and newer.
- fp32, or any dtype on CPU: torch's scaled dot product attention, once per segment, or for causal
  rows that are cut one call with a mask.

On a GPU the unfused math kernel is never used silently: it is refused.

Shapes in this file: s local tokens, L tokens of the whole row (all context ranks), b rows, h query
heads, g key/value heads (query groups), d head dimension.
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
from llada.objectives import Layout

_HOPPER = 9  # major compute capability


@dataclass(frozen=True)
class SegmentLengths:
    """Where segments begin and end, in the form that variable-length kernels take.

    Lengths are cumulative over the flattened tokens of a micro-batch. Example: two rows of 8
    tokens, cut at 3 and at 5, are segments of 3, 5, 5 and 3 tokens: `keys` is [0, 3, 8, 13, 16].

    Causal segments are aligned at their ends: the last query sees all keys of its segment, the one
    before it all but the last. If a context rank has queries 4 and 5 of a segment of 8 tokens, the
    lengths are therefore those of two segments: one of 2 queries and 6 keys, one of no query and
    the 2 keys behind them.

    If all rows have the same boundaries, nothing is flattened. Attention treats heads alike, so the
    rows are passed as additional heads of one row, which is a view of [s, b, h, d] tensors and not
    a copy.

    Attributes:
        queries: Cumulative lengths of the local queries, int32 [segments + 1].
        keys: Cumulative lengths of all keys, int32 [segments + 1].
        longest_query: Largest number of local queries in a segment.
        longest_key: Largest number of keys in a segment.
        rows_are_heads: The lengths are those of one row and hold for every row.
        causal: A query does not see the keys behind it.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    rows_are_heads: bool
    causal: bool


VarlenAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, SegmentLengths], torch.Tensor]
"""(q [queries, heads, d], k and v [keys, key heads, d], lengths) -> [queries, heads, d]."""


@dataclass(frozen=True)
class Kernel:
    """A variable-length flash attention kernel.

    Attributes:
        name: Name for people, and for the versions recorded in a checkpoint.
        call: The kernel; it may have fewer key heads than query heads.
        whole_rows: Use it for rows of one segment too. False: torch's scaled dot product attention,
            which has more kernels, computes them.
    """

    name: str
    call: VarlenAttention
    whole_rows: bool

    def computes(self, layout: Layout, length: int) -> bool:
        """Whether this kernel, and not scaled dot product attention, computes such rows.

        Args:
            layout: Segments of the whole rows.
            length: Number of local queries per row.
        """
        if layout.rule == "causal" and length < layout.length:
            # torch's scaled dot product attention is causal only for as many queries as keys.
            return True
        return self.whole_rows or not layout.whole()


@dataclass(frozen=True)
class AttentionInputs:
    """What all attention layers share in one micro-batch.

    Megatron-Core hands it from layer to layer as `packed_seq_params`.

    Attributes:
        layout: Segments of the whole rows.
        offset: Position of this rank's first query in the row (context parallelism), in tokens.
        cos, sin: Rotary tables of this rank's tokens, fp32 [s, 1, 1, d / 2].
        kernel: The variable-length kernel that computes this micro-batch; None: scaled dot product
            attention, once per segment.
        lengths: Lengths for the kernel, on the device of the tensors.
    """

    layout: Layout
    offset: int
    cos: torch.Tensor
    sin: torch.Tensor
    kernel: Kernel | None = None
    lengths: SegmentLengths | None = None

    @property
    def qkv_format(self) -> str:
        """Read by Megatron-Core: tensors stay [s, b, h, d]."""
        return self.layout.qkv_format


# -- rotary embedding ------------------------------------------------------------------------------


def rotary_tables(
    positions: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of the rotary embedding (arXiv 2104.09864).

    Args:
        positions: Integers [s].
        head_dim: Even.
        theta: Base of the frequencies theta^(-2i / head_dim).

    Returns:
        cos and sin, each fp32 [s, 1, 1, head_dim / 2].
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (channels / head_dim)
    angles = torch.outer(positions.float(), frequencies)[:, None, None, :]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to [s, b, h, d] in fp32, and cast back.

    Channel i is paired with channel i + d / 2 (the half-rotation convention of Llama and GPT-NeoX).
    """
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the opposite rotation, so only the tables are kept for it."""

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
    # (first cos - second sin, second cos + first sin), written without temporaries
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out.to(x.dtype)


# -- inputs of a micro-batch -----------------------------------------------------------------------


def segment_lengths(layout: Layout, offset: int, length: int) -> SegmentLengths:
    """Lengths of all segments, row by row, on CPU.

    The local queries are tokens [offset, offset + length) of every row; a segment without a local
    query has a query length of 0. All ranks have all keys.

    Args:
        layout: Segments of the whole rows.
        offset: Position of the first local query.
        length: Number of local queries per row.
    """
    causal = layout.rule == "causal"
    rows_are_heads = len(set(layout.bounds)) == 1
    rows = layout.bounds[:1] if rows_are_heads else layout.bounds
    queries = []
    keys = []
    for bounds in rows:
        for start, end in itertools.pairwise(bounds):
            first_query = max(start, offset)
            last_query = min(end, offset + length)
            num_queries = max(0, last_query - first_query)
            if causal and num_queries and last_query < end:
                # No local query sees the keys behind the last one.
                queries += [num_queries, 0]
                keys += [last_query - start, end - last_query]
            else:
                queries.append(num_queries)
                keys.append(end - start)
    return SegmentLengths(
        _cumulative(queries), _cumulative(keys), max(queries), max(keys), rows_are_heads, causal
    )


def _cumulative(lengths: list[int]) -> torch.Tensor:
    """0 and the running sums, int32 [n + 1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def attention_inputs(
    layout: Layout,
    positions: torch.Tensor,
    offset: int,
    head_dim: int,
    theta: float,
    kernel: Kernel | None = None,
    lengths: SegmentLengths | None = None,
) -> AttentionInputs:
    """Prepare what the layers of one micro-batch share.

    Args:
        layout: Segments of the whole rows.
        positions: This rank's rotary positions [s], on the device.
        offset: Position of this rank's first token in the row.
        head_dim: Dimensions of a head in the rotary embedding.
        theta: Base of the rotary embedding.
        kernel: The run's variable-length kernel, if it has one.
        lengths: Lengths for the kernel, on the device. None: scaled dot product attention computes
            this micro-batch.
    """
    cos, sin = rotary_tables(positions, head_dim, theta)
    if lengths is None:
        kernel = None
    return AttentionInputs(layout, offset, cos, sin, kernel, lengths)


# -- attention -------------------------------------------------------------------------------------


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: AttentionInputs
) -> torch.Tensor:
    """Attention within segments.

    Args:
        q: This rank's tokens, [s, b, h, d].
        k: The whole rows, [L, b, g, d].
        v: The whole rows, [L, b, g, d].
        inputs: Inputs of the micro-batch.

    Returns:
        [s, b, h, d].
    """
    lengths = inputs.lengths
    if inputs.kernel is None or lengths is None:
        return segmented_sdpa(q, k, v, inputs)
    if lengths.rows_are_heads:
        # With r query heads per key head, query head i of row b becomes head b h + i, and its key
        # head (b h + i) // r = b g + i // r is that of the same row.
        out = inputs.kernel.call(_rows_as_heads(q), _rows_as_heads(k), _rows_as_heads(v), lengths)
        return out.view(q.shape)
    out = inputs.kernel.call(_rows_end_to_end(q), _rows_end_to_end(k), _rows_end_to_end(v), lengths)
    s, b = q.shape[:2]
    return out.view(b, s, *q.shape[2:]).transpose(0, 1)


def _rows_as_heads(x: torch.Tensor) -> torch.Tensor:
    """[s, b, h, d] -> [s, b h, d], a view."""
    return x.flatten(1, 2)


def _rows_end_to_end(x: torch.Tensor) -> torch.Tensor:
    """[s, b, h, d] -> [b s, h, d], a copy."""
    return x.transpose(0, 1).flatten(0, 1)


def segmented_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: AttentionInputs
) -> torch.Tensor:
    """Scaled dot product attention, once per segment; shapes as in `attend`.

    Rows with equal boundaries are computed together. Causal rows that are cut are computed in one
    call with a mask instead.
    """
    if inputs.layout.rule == "causal":
        if inputs.layout.whole() and len(q) == len(k):
            return _sdpa(q, k, v, is_causal=True)
        return _sdpa(q, k, v, mask=_causal_mask(inputs, len(q)))
    if inputs.layout.whole():
        return _sdpa(q, k, v)
    first = inputs.offset
    last = inputs.offset + len(q)
    outputs = []
    order: list[int] = []
    for bounds, rows in inputs.layout.groups().items():
        parts = []
        for start, end in itertools.pairwise(bounds):
            # The local queries of this segment; there may be none.
            low = max(start, first)
            high = min(end, last)
            if low < high:
                queries = q[low - first : high - first, rows]
                parts.append(_sdpa(queries, k[start:end, rows], v[start:end, rows]))
        outputs.append(torch.cat(parts))
        order.extend(rows)
    # Back from the order of the groups to that of the rows.
    original_order = torch.tensor(order, device=q.device).argsort()
    return torch.cat(outputs, dim=1)[:, original_order]


def _causal_mask(inputs: AttentionInputs, length: int) -> torch.Tensor:
    """Which keys each local query sees: those of its segment up to itself, bool [b, 1, s, L]."""
    layout = inputs.layout
    device = inputs.cos.device
    keys = torch.arange(layout.length, device=device)
    queries = keys[inputs.offset : inputs.offset + length]
    masks = []
    for bounds in layout.bounds:
        segments = torch.bucketize(keys, torch.tensor(bounds[1:], device=device), right=True)
        same = segments[inputs.offset : inputs.offset + length, None] == segments[None, :]
        masks.append(same & (keys[None, :] <= queries[:, None]))
    return torch.stack(masks)[:, None]


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot product attention of [s, b, h, d] tensors.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        is_causal: A query does not see the keys behind it; as many queries as keys.
        mask: Which keys each query sees, bool [b, 1, s, keys].

    Raises:
        RunError: On a GPU, only the unfused math kernel could compute it.
    """
    if k.shape[2] != q.shape[2]:
        k = _repeat_heads(k, q.shape[2], dim=2)
        v = _repeat_heads(v, q.shape[2], dim=2)
    # [s, b, h, d] -> [b, h, s, d]
    q = q.permute(1, 2, 0, 3)
    k = k.permute(1, 2, 0, 3)
    v = v.permute(1, 2, 0, 3)
    with fused_kernels_only() if q.is_cuda else contextlib.nullcontext():
        try:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise RunError(
                f"attention: no fused kernel on this GPU for {q.dtype}, head dimension"
                f" {q.shape[-1]}; the math kernel is refused"
            ) from None
    return out.permute(2, 0, 1, 3)


def _repeat_heads(x: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Give every query head its own copy of its key or value head."""
    return x.repeat_interleave(heads // x.shape[dim], dim=dim)


def fused_kernels_only() -> contextlib.AbstractContextManager[None]:
    """Restrict scaled dot product attention to its fused kernels, the fastest one first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    flash = SDPBackend.FLASH_ATTENTION
    cudnn = SDPBackend.CUDNN_ATTENTION
    efficient = SDPBackend.EFFICIENT_ATTENTION
    # On Hopper and newer cuDNN's kernel is the fastest.
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= _HOPPER:
        return sdpa_kernel([cudnn, flash, efficient], set_priority=True)
    return sdpa_kernel([flash, cudnn, efficient], set_priority=True)


# -- variable-length kernels -----------------------------------------------------------------------


# Name, module, and the first and last major compute capability of the GPUs it is made for. On other
# GPUs its kernels fail.
_FLASH_ATTN = (
    ("flash-attn 4", "flash_attn.cute", (10, 11)),
    ("flash-attn 3", "flash_attn_interface", (9, 9)),
    ("flash-attn 2", "flash_attn", (8, 99)),
)


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel | None:
    """Choose the kernel of a run; None means scaled dot product attention (CPU, or fp32).

    Raises:
        RunError: bf16 on a GPU without a variable-length kernel.
        UserError: A head dimension that flash kernels do not support.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return None
    if head_dim % 8 or head_dim > 256:
        raise UserError(
            f"model.hidden_size: the head dimension {head_dim} (hidden_size / num_attention_heads)"
            " must be a multiple of 8 and at most 256 for flash attention in bf16 on a GPU"
        )
    kernel = varlen_kernel(torch.cuda.get_device_capability(device)[0])
    if kernel is None:
        raise RunError(
            "attention: neither flash-attn nor torch's variable-length attention is installed;"
            " install the gpu extra"
        )
    return kernel


def kernel_name() -> str:
    """Name of what computes attention in bf16 on this machine's GPU."""
    kernel = varlen_kernel(torch.cuda.get_device_capability()[0])
    return kernel.name if kernel else "torch scaled dot product"


@functools.cache
def varlen_kernel(capability: int) -> Kernel | None:
    """The fastest of `installed_kernels`, which runs use; None if there is none."""
    return next(iter(installed_kernels(capability)), None)


def installed_kernels(capability: int) -> list[Kernel]:
    """The variable-length flash kernels for bf16 on a GPU, the fastest first.

    Args:
        capability: Major compute capability of the GPU.
    """
    kernels = []
    for name, module, (first, last) in _FLASH_ATTN:
        if not first <= capability <= last:
            continue
        try:
            function = importlib.import_module(module).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        # flash-attn 2 was written for Ampere. On Hopper and newer cuDNN, behind torch's scaled dot
        # product attention, is faster.
        whole_rows = name != "flash-attn 2" or capability < _HOPPER
        kernels.append(Kernel(name, functools.partial(_call_flash_attn, function), whole_rows))
    with contextlib.suppress(ImportError, AttributeError):
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        parameters = frozenset(inspect.signature(function).parameters)
        call = functools.partial(_call_torch_varlen, function, parameters)
        kernels.append(Kernel("torch varlen", call, whole_rows=False))
    return kernels


def _call_flash_attn(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: SegmentLengths,
) -> torch.Tensor:
    options: dict[str, bool] = {"causal": lengths.causal}
    # Its backward pass then adds in a fixed order, which is slower.
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=lengths.queries,
        cu_seqlens_k=lengths.keys,
        max_seqlen_q=lengths.longest_query,
        max_seqlen_k=lengths.longest_key,
        **options,
    )
    # Some versions return (output, log-sum-exp).
    return out[0] if isinstance(out, tuple) else out


def _call_torch_varlen(
    function: Callable[..., torch.Tensor],
    parameters: frozenset[str],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: SegmentLengths,
) -> torch.Tensor:
    options: dict[str, bool | tuple[int, int]] = {}
    if lengths.causal:
        # Newer versions have a window: all keys before the query, none behind it.
        if "window_size" in parameters:
            options["window_size"] = (-1, 0)
        else:
            options["is_causal"] = True
    if k.shape[1] != q.shape[1]:
        # Older versions require as many key heads as query heads.
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            k = _repeat_heads(k, q.shape[1], dim=1)
            v = _repeat_heads(v, q.shape[1], dim=1)
    return function(
        q,
        k,
        v,
        lengths.queries,
        lengths.keys,
        lengths.longest_query,
        lengths.longest_key,
        **options,
    )
