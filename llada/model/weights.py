"""The one weight map: canonical (published Hugging Face LLaDA) names <-> Megatron-Core shards.

Initialization, import, export and parity tests all go through it. What a tensor-parallel rank holds
of a Megatron parameter is a list of `WeightRectangle`s, each a rectangle of one canonical tensor:

- the fused QKV interleaves query, key and value heads, query group by query group,
- fc1 is the gate above the up projection,
- embedding and head are cut by rows, output projections by columns.

Example: hidden size 64, 4 query heads on 2 key heads of dimension 16, two tensor ranks. Rank 1
holds query group 1. Its QKV parameter of 64 rows is rows 32-63 of q_proj, then rows 16-31 of
k_proj, then rows 16-31 of v_proj, all 64 columns each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from llada.arithmetic import ceil_div
from llada.config.sections import ModelSection
from llada.noise import stream, uniforms

INIT_BLOCK_ROWS = 64
"""Rows of a weight that share one random stream. A rank generates only the blocks that its shard
touches."""

BLOCK_ELEMENTS = 1 << 22
"""Elements that are read at a time when tensors are streamed. The allocator reuses memory of this
size; larger blocks would be mapped anew each time."""

EMBEDDING = "model.transformer.wte.weight"
HEAD = "model.transformer.ff_out.weight"
FINAL_NORM = "model.transformer.ln_f.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
BLOCK = re.compile(r"^model\.transformer\.blocks\.(\d+)\.(.+)\.weight$")


@dataclass(frozen=True)
class WeightRectangle:
    """A rectangle of a canonical tensor, and its place in the Megatron parameter of this rank.

    Attributes:
        name: Canonical name.
        rows: First and past-the-last row in the canonical tensor.
        columns: First and past-the-last column; None for vectors.
        local_row: First row in the local parameter.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    local_row: int


def canonical_shapes(model: ModelSection) -> dict[str, tuple[int, ...]]:
    """Shape of every canonical tensor, in the order of the published files."""
    d = model.hidden_size
    kv = model.kv_heads * model.head_dim
    ff = model.ffn_hidden_size
    vocab = model.vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, d)}
    for layer in range(model.num_layers):
        block = f"model.transformer.blocks.{layer}"
        shapes |= {
            f"{block}.attn_norm.weight": (d,),
            f"{block}.q_proj.weight": (d, d),
            f"{block}.k_proj.weight": (kv, d),
            f"{block}.v_proj.weight": (kv, d),
            f"{block}.attn_out.weight": (d, d),
            f"{block}.ff_norm.weight": (d,),
            f"{block}.ff_proj.weight": (ff, d),
            f"{block}.up_proj.weight": (ff, d),
            f"{block}.ff_out.weight": (d, ff),
        }
    shapes[FINAL_NORM] = (d,)
    if not model.tie_embeddings:
        shapes[HEAD] = (vocab, d)
    return shapes


class Weights(Protocol):
    """The canonical tensors of a model, wherever they are.

    They are read a few rows at a time, so that none has to fit into memory.

    Attributes:
        shapes: Shape of every tensor by canonical name, in the order of the published files.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        ...

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of a tensor, or elements of a vector, on the CPU.

        The caller may change the result.
        """
        ...


def row_blocks(shape: tuple[int, ...], limit: int) -> Iterator[tuple[int, int]]:
    """Yield first and past-the-last row of consecutive blocks of at most `limit` elements.

    A block has at least one row.
    """
    step = max(1, limit // torch.Size(shape[1:]).numel())
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def parameter_names(model: ModelSection) -> list[str]:
    """Megatron names of all parameters of an unsharded model, in the order of the model."""
    names = ["embedding.word_embeddings.weight"]
    for layer in range(model.num_layers):
        names += [
            f"decoder.layers.{layer}.input_layernorm.weight",
            f"decoder.layers.{layer}.self_attention.linear_qkv.weight",
            f"decoder.layers.{layer}.self_attention.linear_proj.weight",
            f"decoder.layers.{layer}.pre_mlp_layernorm.weight",
            f"decoder.layers.{layer}.mlp.linear_fc1.weight",
            f"decoder.layers.{layer}.mlp.linear_fc2.weight",
        ]
    names.append("decoder.final_layernorm.weight")
    if not model.tie_embeddings:
        names.append("output_layer.weight")
    return names


def num_parameters(model: ModelSection, embedding: bool = True) -> int:
    """Number of parameters; without embedding and head if `embedding` is false."""
    total = 0
    for name, shape in canonical_shapes(model).items():
        if embedding or name not in (EMBEDDING, HEAD):
            total += torch.Size(shape).numel()
    return total


def rectangles(
    model: ModelSection, name: str, tp_rank: int = 0, tp_size: int = 1
) -> list[WeightRectangle]:
    """The canonical rectangles that make up a Megatron parameter on one tensor-parallel rank.

    Args:
        model: Shape of the model.
        name: Megatron name, with the layer number counted over the whole model.
        tp_rank: Tensor-parallel rank.
        tp_size: Tensor-parallel size.

    Raises:
        KeyError: Not a parameter of this model.
    """
    d = model.hidden_size
    ff = model.ffn_hidden_size

    def share(n: int) -> tuple[int, int]:
        """This rank's part of n rows or columns."""
        return n // tp_size * tp_rank, n // tp_size * (tp_rank + 1)

    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        is_embedding = name.startswith("embedding") or model.tie_embeddings
        canonical = EMBEDDING if is_embedding else HEAD
        return [WeightRectangle(canonical, share(model.vocab_size), (0, d), 0)]
    if name == "decoder.final_layernorm.weight":
        return [WeightRectangle(FINAL_NORM, (0, d), None, 0)]
    match = _LAYER.match(name)
    if match is None:
        raise KeyError(name)
    layer, part = match.groups()
    block = f"model.transformer.blocks.{layer}"
    if part == "self_attention.linear_qkv.weight":
        return _qkv_rectangles(model, block, share(model.kv_heads))
    if part == "mlp.linear_fc1.weight":
        return [
            WeightRectangle(f"{block}.ff_proj.weight", share(ff), (0, d), 0),
            WeightRectangle(f"{block}.up_proj.weight", share(ff), (0, d), ff // tp_size),
        ]
    if part == "self_attention.linear_proj.weight":
        columns = share(model.num_attention_heads * model.head_dim)
        return [WeightRectangle(f"{block}.attn_out.weight", (0, d), columns, 0)]
    if part == "mlp.linear_fc2.weight":
        return [WeightRectangle(f"{block}.ff_out.weight", (0, d), share(ff), 0)]
    norms = {"input_layernorm.weight": "attn_norm", "pre_mlp_layernorm.weight": "ff_norm"}
    return [WeightRectangle(f"{block}.{norms[part]}.weight", (0, d), None, 0)]


def _qkv_rectangles(
    model: ModelSection, block: str, groups: tuple[int, int]
) -> list[WeightRectangle]:
    """Megatron's fused QKV: for each query group its query heads, its key head, its value head.

    Args:
        model: Shape of the model.
        block: Canonical prefix of the layer.
        groups: First and past-the-last query group of the rank.
    """
    head_dim = model.head_dim
    queries_per_group = model.num_attention_heads // model.kv_heads
    qkv = []
    local_row = 0
    for group in range(*groups):
        # (projection, first head, number of heads)
        parts = (
            ("q_proj", group * queries_per_group, queries_per_group),
            ("k_proj", group, 1),
            ("v_proj", group, 1),
        )
        for part, first_head, num_heads in parts:
            rows = (first_head * head_dim, (first_head + num_heads) * head_dim)
            columns = (0, model.hidden_size)
            qkv.append(WeightRectangle(f"{block}.{part}.weight", rows, columns, local_row))
            local_row += num_heads * head_dim
    return qkv


def parameter_shape(model: ModelSection, name: str) -> tuple[int, ...]:
    """Shape of a whole Megatron parameter."""
    parts = rectangles(model, name)
    num_rows = sum(part.rows[1] - part.rows[0] for part in parts)
    columns = parts[0].columns
    if columns is None:
        return (num_rows,)
    return (num_rows, columns[1])


def global_names(chunk: torch.nn.Module, layer_offset: int) -> dict[str, torch.nn.Parameter]:
    """Parameters of a model chunk by Megatron name, with layers numbered over the whole model.

    Megatron numbers the layers of each chunk from 0.
    """
    parameters = {}
    for name, parameter in chunk.named_parameters():
        match = _LAYER.match(name)
        if match:
            layer, part = match.groups()
            name = f"decoder.layers.{int(layer) + layer_offset}.{part}"
        parameters[name] = parameter
    return parameters


def initial_std(model: ModelSection, name: str) -> float:
    """Standard deviation of the published "mitchell" initialization of a canonical matrix.

    It is that of the normal distribution before it is truncated at 3 sigma.
    """
    match = BLOCK.match(name)
    # Matrices that write to the residual stream start smaller, the more so the deeper they are.
    if match and match[2] == "attn_out":
        return (2 * model.hidden_size * (int(match[1]) + 1)) ** -0.5
    if match and match[2] == "ff_out":
        return (2 * model.ffn_hidden_size * (int(match[1]) + 1)) ** -0.5
    if name == EMBEDDING and model.embedding_init_std is not None:
        return model.embedding_init_std
    return model.hidden_size**-0.5


def initial_values(model: ModelSection, seed: int, rectangle: WeightRectangle) -> torch.Tensor:
    """The initial values of a rectangle, float64, independent of the layout.

    Norms start at one. Other weights are normal, truncated at 3 sigma: uniform draws from the
    Philox streams of (seed, canonical name, row block), put through the inverse of the truncated
    distribution function.
    """
    first, last = rectangle.rows
    if rectangle.columns is None:
        return torch.ones(last - first, dtype=torch.float64)
    width = canonical_shapes(model)[rectangle.name][1]
    blocks = []
    # Generate every row block that the rectangle touches, and keep its rows and columns. Example:
    # rows 100 to 149 touch blocks 1 (rows 64-127) and 2 (rows 128-191).
    for block in range(first // INIT_BLOCK_ROWS, ceil_div(last, INIT_BLOCK_ROWS)):
        key = stream(seed, f"init/{rectangle.name}", block)
        draws = uniforms(key, INIT_BLOCK_ROWS * width).reshape(INIT_BLOCK_ROWS, width)
        block_row = block * INIT_BLOCK_ROWS
        rows = slice(max(first - block_row, 0), last - block_row)
        blocks.append(torch.from_numpy(draws[rows, slice(*rectangle.columns)]))
    # Uniform in (0, 1) -> uniform in (Phi(-3), Phi(3)) -> normal in (-3, 3)
    low = torch.special.ndtr(torch.tensor(-3.0, dtype=torch.float64))
    quantiles = low + torch.cat(blocks) * (1 - 2 * low)
    return torch.special.ndtri(quantiles) * initial_std(model, rectangle.name)


@torch.no_grad()
def initialize(
    model: ModelSection,
    seed: int,
    parameters: Mapping[str, torch.Tensor],
    tp_rank: int = 0,
    tp_size: int = 1,
) -> None:
    """Fill a rank's Megatron parameters (by global name) with the keyed initial values.

    The values are rounded to the dtype of each parameter.
    """
    for name, parameter in parameters.items():
        for rectangle in rectangles(model, name, tp_rank, tp_size):
            values = initial_values(model, seed, rectangle)
            parameter[rectangle.local_row : rectangle.local_row + len(values)].copy_(values)


def parameter_rows(
    model: ModelSection,
    source: Weights,
    name: str,
    first: int,
    last: int,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> torch.Tensor:
    """Assemble rows of what a rank holds of a Megatron parameter from the canonical tensors.

    Args:
        model: Shape of the model.
        source: The canonical tensors.
        name: Megatron name, with the layer number counted over the whole model.
        first: First row of the local parameter.
        last: Past-the-last row of the local parameter.
        tp_rank: Tensor-parallel rank.
        tp_size: Tensor-parallel size.
    """
    parts = []
    for rectangle in rectangles(model, name, tp_rank, tp_size):
        # A local row plus `shift` is the row of the canonical tensor.
        shift = rectangle.rows[0] - rectangle.local_row
        start = max(first, rectangle.local_row)
        stop = min(last, rectangle.rows[1] - shift)
        if start < stop:
            rows = source.rows(rectangle.name, start + shift, stop + shift)
            if rectangle.columns is not None:
                rows = rows[:, slice(*rectangle.columns)]
            parts.append(rows)
    # torch.cat would copy a single part.
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def scatter(
    model: ModelSection,
    source: Weights,
    name: str,
    out: torch.Tensor,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> None:
    """Copy what a rank holds of a Megatron parameter from the canonical tensors into `out`.

    Arguments are those of `parameter_rows`; `out` may have any dtype.
    """
    for first, last in row_blocks(tuple(out.shape), BLOCK_ELEMENTS):
        out[first:last].copy_(parameter_rows(model, source, name, first, last, tp_rank, tp_size))
