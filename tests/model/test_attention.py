"""Attention per segment, and the choice of kernel, against a plain masked softmax."""

from __future__ import annotations

import itertools
import math
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from llada.errors import RunError, UserError
from llada.model import attention
from llada.objectives import Layout

LAYOUT = Layout(((0, 16), (0, 5, 6, 16), (0, 16), (0, 9, 16)), 16)
CAUSAL = replace(LAYOUT, rule="causal")
WHOLE_CAUSAL = Layout(((0, 16),) * 4, 16, "causal")


def qkv(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(
        torch.randn(16, 4, heads, 8, dtype=dtype, requires_grad=True) for heads in (6, 2, 2)
    )


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout = LAYOUT
) -> torch.Tensor:
    """A softmax over a boolean mask; [s, b, h, d]."""
    ids = torch.stack(
        [
            torch.searchsorted(torch.tensor(row[1:]), torch.arange(16), right=True)
            for row in layout.bounds
        ]
    )
    same = ids[:, None, :, None] == ids[:, None, None, :]
    if layout.rule == "causal":
        same = same & torch.ones(16, 16, dtype=torch.bool).tril()
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~same, -math.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3)


def inputs(
    offset: int = 0,
    length: int = 16,
    kernel: attention.Kernel | None = None,
    layout: Layout = LAYOUT,
) -> attention.AttentionInputs:
    lengths = (
        attention.segment_lengths(layout, offset, length)
        if kernel is not None and kernel.computes(layout, length)
        else None
    )
    return attention.attention_inputs(
        layout, torch.arange(offset, offset + length), offset, 8, 1e4, kernel, lengths
    )


@pytest.mark.parametrize("layout", [LAYOUT, CAUSAL, WHOLE_CAUSAL])
def test_segments_and_their_gradients(layout: Layout) -> None:
    tensors = qkv()
    torch.manual_seed(1)
    seed = torch.randn(16, 4, 6, 8)
    own = attention.attend(*tensors, inputs(layout=layout))
    expected_output = plain(*tensors, layout)
    torch.testing.assert_close(own, expected_output, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad((own * seed).sum(), tensors)
    expected = torch.autograd.grad((expected_output * seed).sum(), tensors)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [LAYOUT, CAUSAL, WHOLE_CAUSAL])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_contiguous_part_of_the_queries_sees_the_keys_of_its_segments(
    parts: int, layout: Layout
) -> None:
    """Context parallelism: each rank has a part of the row's queries and the gathered keys and
    values.
    """
    q, k, v = qkv()
    size = 16 // parts
    parts_of_output = [
        attention.attend(q[i : i + size], k, v, inputs(i, size, layout=layout))
        for i in range(0, 16, size)
    ]
    expected = plain(q, k, v, layout)
    torch.testing.assert_close(torch.cat(parts_of_output), expected, rtol=1e-5, atol=1e-6)


def loop_kernel(q: Any, k: Any, v: Any, lengths: attention.SegmentLengths) -> torch.Tensor:
    """What a variable-length kernel computes, segment by segment; a segment may have no query."""
    cu_q, cu_k = lengths.queries, lengths.keys
    assert cu_q.dtype == torch.int32
    assert lengths.longest_query == cu_q.diff().max()
    assert lengths.longest_key == cu_k.diff().max()
    out = torch.empty_like(q)
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        keys, values = (x[c:d].repeat_interleave(3, dim=1).transpose(0, 1) for x in (k, v))
        scores = q[a:b].transpose(0, 1) @ keys.transpose(-1, -2) / math.sqrt(8)
        if lengths.causal and b > a:
            # The last query sees all keys.
            seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            scores = scores.masked_fill(~seen, -math.inf)
        out[a:b] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out


@pytest.mark.parametrize("layout", [LAYOUT, CAUSAL, WHOLE_CAUSAL])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_cumulative_lengths_for_a_variable_length_kernel(parts: int, layout: Layout) -> None:
    kernel = attention.Kernel("loop", loop_kernel, whole_rows=True)
    q, k, v = qkv()
    size = 16 // parts
    parts_of_output = [
        attention.attend(q[i : i + size], k, v, inputs(i, size, kernel, layout))
        for i in range(0, 16, size)
    ]
    torch.testing.assert_close(
        torch.cat(parts_of_output), plain(q, k, v, layout), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_rows_with_equal_boundaries_are_computed_as_further_heads_without_a_copy(
    parts: int,
) -> None:
    """Six query heads on two key heads in four rows: the kernel sees one row with 24 query heads on
    8.
    """
    seen: list[Any] = []

    def noted(q: Any, k: Any, v: Any, lengths: attention.SegmentLengths) -> torch.Tensor:
        seen.append((q, k))
        return loop_kernel(q, k, v, lengths)

    kernel = attention.Kernel("noted", noted, whole_rows=True)
    layout = Layout(((0, 5, 6, 16),) * 4, 16)
    q, k, v = qkv()
    size = 16 // parts
    outputs = [
        attention.attend(q[i : i + size], k, v, inputs(i, size, kernel, layout))
        for i in range(0, 16, size)
    ]
    torch.testing.assert_close(torch.cat(outputs), plain(q, k, v, layout), rtol=1e-5, atol=1e-6)
    assert seen[0][0].shape == (size, 24, 8) and seen[0][1].shape == (16, 8, 8)
    assert seen[0][0].data_ptr() == q.data_ptr() and seen[0][1].data_ptr() == k.data_ptr()


@pytest.mark.parametrize("whole_rows", [False, True])
def test_flash_attn_computes_whole_rows_too(whole_rows: bool) -> None:
    calls = []

    def noted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return loop_kernel(*args)

    q, k, v = qkv()
    layout = Layout(((0, 16),) * 4, 16)
    kernel = attention.Kernel("noted", noted, whole_rows)
    out = attention.attend(q, k, v, inputs(kernel=kernel, layout=layout))
    torch.testing.assert_close(
        out, attention.attend(q, k, v, inputs(layout=layout)), rtol=1e-5, atol=1e-6
    )
    assert len(calls) == whole_rows


@pytest.mark.parametrize("rule", ["causal", "bidirectional"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_part_of_a_causal_row_needs_the_kernel(rule: Any, parts: int) -> None:
    """One segment a row: torch's own attention is causal only with as many queries as keys."""
    kernel = attention.Kernel("noted", loop_kernel, whole_rows=False)
    layout = Layout(((0, 16),) * 4, 16, rule)
    size = 16 // parts
    assert kernel.computes(layout, size) == (rule == "causal" and parts > 1)
    q, k, v = qkv()
    outputs = [
        attention.attend(q[i : i + size], k, v, inputs(i, size, kernel, layout))
        for i in range(0, 16, size)
    ]
    torch.testing.assert_close(torch.cat(outputs), plain(q, k, v, layout), rtol=1e-5, atol=1e-6)


def test_rotation_and_its_gradient() -> None:
    positions = torch.arange(16)
    cos, sin = attention.rotary_tables(positions, 8, 1e4)
    x = torch.randn(16, 4, 6, 8, requires_grad=True)
    pairs = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous())
    angles = positions[:, None].double() * 1e4 ** (-torch.arange(0, 8, 2).double() / 8)
    turned = torch.view_as_real(
        pairs * torch.polar(torch.ones_like(angles), angles)[:, None, None, :].to(pairs.dtype)
    )
    expected = torch.cat((turned[..., 0], turned[..., 1]), -1)
    torch.testing.assert_close(attention.rotate(x, cos, sin), expected, rtol=1e-5, atol=1e-5)
    seed = torch.randn_like(x)
    ours = torch.autograd.grad((attention.rotate(x, cos, sin) * seed).sum(), x)[0]
    torch.testing.assert_close(
        ours, torch.autograd.grad((expected * seed).sum(), x)[0], rtol=1e-5, atol=1e-5
    )


def test_bf16_is_rotated_in_fp32() -> None:
    cos, sin = attention.rotary_tables(torch.arange(2000, 2016), 8, 1e4)
    x = torch.randn(16, 4, 6, 8).bfloat16()
    assert torch.equal(
        attention.rotate(x, cos, sin), attention.rotate(x.float(), cos, sin).bfloat16()
    )


def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(attributes)
    return made


EVERY = ["flash_attn.cute", "flash_attn_interface", "flash_attn"]


@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [
        (EVERY, 10, "flash-attn 4"),
        (EVERY, 9, "flash-attn 3"),
        (["flash_attn.cute", "flash_attn"], 9, "flash-attn 2"),
        (EVERY, 8, "flash-attn 2"),
        (["flash_attn_interface"], 8, "torch varlen"),
        ([], 9, "torch varlen"),
    ],
)
def test_the_newest_kernel_made_for_the_gpu_is_chosen(
    installed: list[str], capability: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(
        q: torch.Tensor, *_: Any, causal: bool = True, **__: Any
    ) -> tuple[torch.Tensor, None]:
        assert causal is False
        return q, None

    for name in EVERY:
        monkeypatch.setitem(
            sys.modules,
            name,
            module(name, flash_attn_varlen_func=kernel) if name in installed else None,
        )
    chosen = attention.varlen_kernel.__wrapped__(capability)
    assert chosen is not None and chosen.name == expected
    # On Hopper and newer whole rows are cuDNN's where flash-attn 2 is the newest.
    assert chosen.whole_rows == (
        expected not in ("torch varlen", "flash-attn 2")
        or (expected, capability) == ("flash-attn 2", 8)
    )
    if expected != "torch varlen":
        q = torch.ones(3, 2, 8)
        whole = attention.segment_lengths(Layout(((0, 3),), 3), 0, 3)
        assert chosen.call(q, q, q, whole) is q


def test_a_gpu_without_a_kernel_and_head_dimensions_without_one_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(attention, "varlen_kernel", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(RunError, match="gpu extra"):
        attention.choose_kernel(gpu, torch.bfloat16, 64)
    for head_dim in (20, 264):
        with pytest.raises(UserError, match=f"head dimension {head_dim}"):
            attention.choose_kernel(gpu, torch.bfloat16, head_dim)
    assert attention.choose_kernel(torch.device("cpu"), torch.bfloat16, 20) is None
    assert attention.choose_kernel(gpu, torch.float32, 20) is None


def test_the_math_kernel_is_not_among_those_allowed_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CPU only the math and flash kernels exist: with the fused ones alone, an explicit mask has
    none left.
    """
    q = torch.ones(1, 2, 8, 16)
    mask = torch.ones(8, 8, dtype=torch.bool)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        assert torch.backends.cuda.math_sdp_enabled()
    with attention.fused_kernels_only():
        assert not torch.backends.cuda.math_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
