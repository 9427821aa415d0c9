"""Attention per segment, and the choice of kernel, against a plain masked softmax."""

from __future__ import annotations

import itertools
import math
import sys
import types
from typing import Any

import pytest
import torch

from llada.errors import RunError
from llada.model import attention
from llada.objectives.base import Segments

LAYOUT = Segments(((0, 16), (0, 5, 6, 16), (0, 16), (0, 9, 16)), 16)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(16, 4, heads, 8, dtype=dtype, requires_grad=True) for heads in (6, 2, 2))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Segments = LAYOUT) -> torch.Tensor:
    """A softmax over a boolean mask; [s, b, h, d]."""
    ids = torch.stack([torch.searchsorted(torch.tensor(row[1:]), torch.arange(16), right=True) for row in layout.bounds])
    same = ids[:, None, :, None] == ids[:, None, None, :]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~same, -math.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3)


def inputs(offset: int = 0, length: int = 16, varlen: bool = False) -> attention.AttentionInputs:
    return attention.attention_inputs(LAYOUT, torch.arange(offset, offset + length), offset, 8, 1e4, varlen)


def test_segments_and_their_gradients() -> None:
    tensors = qkv()
    torch.manual_seed(1)
    seed = torch.randn(16, 4, 6, 8)
    ours = torch.autograd.grad((attention.attend(*tensors, inputs()) * seed).sum(), tensors)
    wanted = torch.autograd.grad((plain(*tensors) * seed).sum(), tensors)
    torch.testing.assert_close(attention.attend(*tensors, inputs()), plain(*tensors), rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_contiguous_part_of_the_queries_sees_all_keys_of_its_segments(parts: int) -> None:
    """Context parallelism: each rank has a part of the row's queries and the gathered keys and values."""
    q, k, v = qkv()
    size = 16 // parts
    pieces = [attention.attend(q[i : i + size], k, v, inputs(i, size)) for i in range(0, 16, size)]
    torch.testing.assert_close(torch.cat(pieces), plain(q, k, v), rtol=1e-5, atol=1e-6)


def loop_kernel(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> torch.Tensor:
    """What a variable-length kernel computes, segment by segment; empty query segments are allowed."""
    assert cu_q.dtype == torch.int32 and max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    out = torch.empty_like(q)
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        keys, values = (x[c:d].repeat_interleave(3, dim=1).transpose(0, 1) for x in (k, v))
        scores = q[a:b].transpose(0, 1) @ keys.transpose(-1, -2) / math.sqrt(8)
        out[a:b] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_cumulative_lengths_for_a_variable_length_kernel(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", lambda: ("loop", loop_kernel))
    q, k, v = qkv()
    size = 16 // parts
    pieces = [attention.attend(q[i : i + size], k, v, inputs(i, size, varlen=True)) for i in range(0, 16, size)]
    torch.testing.assert_close(torch.cat(pieces), plain(q, k, v), rtol=1e-5, atol=1e-6)


def test_rotation_and_its_gradient() -> None:
    positions = torch.arange(16)
    cos, sin = attention.rotary_tables(positions, 8, 1e4)
    x = torch.randn(16, 4, 6, 8, requires_grad=True)
    pairs = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous())
    angles = positions[:, None].double() * 1e4 ** (-torch.arange(0, 8, 2).double() / 8)
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None, None, :].to(pairs.dtype))
    wanted = torch.cat((turned[..., 0], turned[..., 1]), -1)
    torch.testing.assert_close(attention.rotate(x, cos, sin), wanted, rtol=1e-5, atol=1e-5)
    seed = torch.randn_like(x)
    ours = torch.autograd.grad((attention.rotate(x, cos, sin) * seed).sum(), x)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * seed).sum(), x)[0], rtol=1e-5, atol=1e-5)


def test_bf16_is_rotated_in_fp32() -> None:
    cos, sin = attention.rotary_tables(torch.arange(2000, 2016), 8, 1e4)
    x = torch.randn(16, 4, 6, 8).bfloat16()
    assert torch.equal(attention.rotate(x, cos, sin), attention.rotate(x.float(), cos, sin).bfloat16())


def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(attributes)
    return made


@pytest.mark.parametrize(
    ("installed", "wanted"),
    [
        (["flash_attn.cute", "flash_attn_interface", "flash_attn"], "flash-attn 4"),
        (["flash_attn_interface", "flash_attn"], "flash-attn 3"),
        (["flash_attn"], "flash-attn 2"),
        ([], "torch varlen"),
    ],
)
def test_the_newest_kernel_is_chosen(installed: list[str], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(q: torch.Tensor, *_: Any, causal: bool = True, **__: Any) -> tuple[torch.Tensor, None]:
        assert causal is False
        return q, None

    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, module(name, flash_attn_varlen_func=kernel) if name in installed else None)
    monkeypatch.setattr(attention, "varlen_kernel", attention.varlen_kernel.__wrapped__)
    found = attention.varlen_kernel()
    assert found is not None and found[0] == wanted
    if installed:
        q = torch.ones(3, 2, 8)
        assert found[1](q, q, q, None, None, 3, 3) is q


def test_a_gpu_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", lambda: None)
    with pytest.raises(RunError, match="gpu extra"):
        attention.uses_varlen(torch.device("cuda", 0), torch.bfloat16)
    assert not attention.uses_varlen(torch.device("cpu"), torch.bfloat16)
    assert not attention.uses_varlen(torch.device("cuda", 0), torch.float32)
