"""Every attention kernel that is installed, at the size of the published models, against a plain
softmax in fp32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llada.errors import RunError
from llada.model import attention
from llada.objectives import Layout
from llada.objectives.layout import Rule
from tests.gpu.conftest import Hardware


class Shape(NamedTuple):
    length: int
    rows: int
    heads: int
    groups: int
    head_dim: int


PUBLISHED = Shape(length=4096, rows=4, heads=8, groups=2, head_dim=128)
TOY = Shape(length=64, rows=4, heads=4, groups=2, head_dim=16)

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-6}
"""Relative L2 error. bf16 keeps 8 bits: operands and results are rounded by up to 2^-9,
probabilities once more.
"""


class RecordedOperators(TorchDispatchMode):
    """Names of all operators that run, by which one sees the kernel that torch chose."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def random_bounds(length: int, rng: np.random.Generator) -> tuple[int, ...]:
    """0, some cuts, one of them after a single token, and the length."""
    cuts = rng.choice(np.arange(2, length), size=6, replace=False)
    return tuple(int(cut) for cut in sorted({0, 1, *cuts, length}))


def layouts(shape: Shape) -> dict[str, Layout]:
    rng = np.random.default_rng(0)
    cut = [random_bounds(shape.length, rng) for _ in range(shape.rows)]
    return {
        "whole rows": Layout(((0, shape.length),) * shape.rows, shape.length),
        "rows cut alike": Layout((cut[0],) * shape.rows, shape.length),
        "rows cut differently": Layout((*cut[:-1], (0, shape.length)), shape.length),
    }


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, offset: int
) -> torch.Tensor:
    """Softmax over the keys of a query's own segment, one row and segment at a time, in fp32; [s,
    b, h, d].
    """
    share = q.shape[2] // k.shape[2]
    rows = []
    for row, bounds in enumerate(layout.bounds):
        parts = []
        for start, end in itertools.pairwise(bounds):
            low, high = max(start, offset), min(end, offset + len(q))
            if low >= high:
                continue
            queries = q[low - offset : high - offset, row].transpose(0, 1)
            keys, values = (
                x[start:end, row].repeat_interleave(share, dim=1).transpose(0, 1) for x in (k, v)
            )
            scores = queries @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
            if layout.rule == "causal":
                query = torch.arange(low, high, device=q.device)[:, None]
                key = torch.arange(start, end, device=q.device)[None, :]
                scores = scores.masked_fill(key > query, -math.inf)
            probabilities = scores.softmax(-1)
            parts.append((probabilities @ values).transpose(0, 1))
        rows.append(torch.cat(parts))
    return torch.stack(rows, dim=1)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


def errors(
    kernel: attention.Kernel | None,
    shape: Shape,
    layout: Layout,
    part: slice,
    dtype: torch.dtype,
    device: str,
) -> dict[str, float]:
    """Relative errors of the output and the three gradients for the queries in `part`, and check
    which kernel ran.
    """
    torch.manual_seed(0)
    offset, length = part.start, part.stop - part.start

    def tensor(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(
            tokens,
            shape.rows,
            heads,
            shape.head_dim,
            device=device,
            dtype=dtype,
            requires_grad=True,
        )

    tensors = (
        tensor(length, shape.heads),
        tensor(shape.length, shape.groups),
        tensor(shape.length, shape.groups),
    )
    used = kernel if kernel is not None and kernel.computes(layout, length) else None
    lengths = None
    if used is not None:
        on_cpu = attention.segment_lengths(layout, offset, length)
        lengths = replace(on_cpu, queries=on_cpu.queries.to(device), keys=on_cpu.keys.to(device))
    positions = torch.arange(offset, offset + length, device=device)
    shared = attention.attention_inputs(
        layout, positions, offset, shape.head_dim, 1e4, used, lengths
    )
    with RecordedOperators() as operators:
        out = attention.attend(*tensors, shared)
    if device == "cuda":
        check_operators(operators.names, used, layout)
    direction = torch.randn(out.shape, device=device)
    gradients = torch.autograd.grad(out, tensors, direction.to(dtype))
    wide = [x.detach().float().requires_grad_() for x in tensors]
    expected = plain(*wide, layout, offset)
    references = torch.autograd.grad(expected, wide, direction.to(dtype).float())
    errors_by_name = {"output": relative_error(out, expected)}
    errors_by_name |= {
        name: relative_error(ours, theirs)
        for name, ours, theirs in zip("qkv", gradients, references, strict=True)
    }
    return errors_by_name


def check_operators(names: set[str], kernel: attention.Kernel | None, layout: Layout) -> None:
    """That the kernel which was meant ran, and torch's unfused one did not."""
    scaled = {name for name in names if "scaled_dot_product" in name}
    if kernel is not None:
        assert not scaled
        assert kernel.name != "torch varlen" or any("varlen" in name for name in names), names
    elif (
        layout.whole()
        and layout.rule == "bidirectional"
        and torch.cuda.get_device_capability()[0] >= 9
    ):
        assert scaled == {"aten::_scaled_dot_product_cudnn_attention"}
    else:  # cuDNN has no kernel for a segment of a single token
        assert scaled and not any("math" in name for name in scaled), names


def kernels(device: str) -> list[attention.Kernel | None]:
    """All that are installed, and torch's scaled dot product."""
    installed: list[attention.Kernel | None] = [None]
    if device == "cuda":
        installed += attention.installed_kernels(torch.cuda.get_device_capability()[0])
    return installed


@pytest.mark.parametrize("rule", ["bidirectional", "causal"])
@pytest.mark.parametrize("cut", ["whole rows", "rows cut alike", "rows cut differently"])
@pytest.mark.parametrize("quarter", [None, 2], ids=["all queries", "a context part"])
def test_every_kernel_is_the_plain_computation(
    cut: str,
    quarter: int | None,
    rule: Rule,
    hardware: Hardware,
    record_property: Callable[[str, object], None],
) -> None:
    """A context part has the queries of one quarter and all keys: most segments then have no query
    at all.
    """
    shape = PUBLISHED if hardware.is_gpu else TOY
    size = shape.length if quarter is None else shape.length // 4
    part = slice((quarter or 0) * size, ((quarter or 0) + 1) * size)
    dtype = torch.bfloat16 if hardware.is_gpu else torch.float32
    layout = replace(layouts(shape)[cut], rule=rule)
    for kernel in kernels(hardware.device):
        errors_by_name = errors(kernel, shape, layout, part, dtype, hardware.device)
        name = kernel.name if kernel is not None else "torch scaled dot product"
        record_property(f"{name}: largest relative error", f"{max(errors_by_name.values()):.1e}")
        assert max(errors_by_name.values()) <= TOLERANCE[dtype], (name, errors_by_name)


@pytest.mark.gpu
def test_a_shape_that_only_the_unfused_kernel_has_is_refused() -> None:
    x = torch.ones(8, 1, 1, 8, device="cuda", dtype=torch.float64)
    shared = attention.attention_inputs(
        Layout(((0, 8),), 8), torch.arange(8, device="cuda"), 0, 8, 1e4
    )
    with pytest.raises(RunError, match="math kernel is refused"):
        attention.attend(x, x, x, shared)
