"""The one weight map: canonical (published Hugging Face LLaDA) names <-> Megatron-Core shards.

Initialisation, import, export and parity tests all go through it. A Megatron parameter of a rank is
a list of `WeightRectangle`s, each a rectangle of one canonical tensor: the fused QKV interleaves
query, key and value heads per query group, fc1 stacks gate and up, the vocabulary is cut by rows,
output projections by columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from llada.config.sections import ModelSection
from llada.noise import stream, uniforms

INIT_BLOCK_ROWS = 64
"""Rows of a weight that share one random stream; a rank generates only the blocks that meet its
shard.
"""

BLOCK_ELEMENTS = 1 << 22
"""Elements read at a time where tensors are streamed: memory of this size is used again, larger
blocks are mapped afresh each time.
"""

EMBEDDING = "model.transformer.wte.weight"
HEAD = "model.transformer.ff_out.weight"
FINAL_NORM = "model.transformer.ln_f.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
BLOCK = re.compile(r"^model\.transformer\.blocks\.(\d+)\.(.+)\.weight$")


@dataclass(frozen=True)
class WeightRectangle:
    """A rectangle of a canonical tensor and where its first row lies in the Megatron parameter of
    this rank.

    Attributes:
        name: canonical name.
        rows: first and past-the-last row in the canonical tensor.
        columns: the same for columns; None for vectors.
        local_row: first row in the local parameter.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    local_row: int


def canonical_shapes(model: ModelSection) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor and its shape, in the order of the published files."""
    d, kv, ff, vocab = (
        model.hidden_size,
        model.kv_heads * model.head_dim,
        model.ffn_hidden_size,
        model.vocab_size,
    )
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
    """The canonical tensors of a model, wherever they are, read some rows at a time: none has to
    fit into memory.

    Attributes:
        shapes: of every tensor by canonical name, in the order of the published files.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        ...

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (past the last) of a tensor, elements of a vector; a new tensor on
        the CPU.
        """
        ...


def row_blocks(shape: tuple[int, ...], limit: int) -> Iterator[tuple[int, int]]:
    """First and past-the-last row of consecutive blocks of at most `limit` elements, at least one
    row each.
    """
    step = max(1, limit // torch.Size(shape[1:]).numel())
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def parameter_names(model: ModelSection) -> list[str]:
    """Megatron names of all parameters of one unsharded model, in the order of the model."""
    attention = ("input_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj")
    layer = (*attention, "pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2")
    names = ["embedding.word_embeddings.weight"]
    names += [
        f"decoder.layers.{i}.{part}.weight" for i in range(model.num_layers) for part in layer
    ]
    names.append("decoder.final_layernorm.weight")
    return names if model.tie_embeddings else [*names, "output_layer.weight"]


def num_parameters(model: ModelSection, embedding: bool = True) -> int:
    """Parameters of the model; without embedding and head when `embedding` is false."""
    counts = {
        name: int(torch.Size(shape).numel()) for name, shape in canonical_shapes(model).items()
    }
    return sum(
        count for name, count in counts.items() if embedding or name not in (EMBEDDING, HEAD)
    )


def pieces(
    model: ModelSection, name: str, tp_rank: int = 0, tp_size: int = 1
) -> list[WeightRectangle]:
    """The canonical rectangles that make up a Megatron parameter on one tensor-parallel rank.

    Args:
        model: shape of the model.
        name: Megatron name with the layer number counted over the whole model.
        tp_rank: tensor-parallel rank.
        tp_size: tensor-parallel size.

    Raises:
        KeyError: not a parameter of this model.
    """
    d, ff, hd = model.hidden_size, model.ffn_hidden_size, model.head_dim

    def share(n: int) -> tuple[int, int]:
        return n // tp_size * tp_rank, n // tp_size * (tp_rank + 1)

    def rows(canonical: str, span: tuple[int, int], local_row: int = 0) -> WeightRectangle:
        return WeightRectangle(canonical, span, (0, d), local_row)

    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        canonical = EMBEDDING if name.startswith("embedding") or model.tie_embeddings else HEAD
        return [rows(canonical, share(model.vocab_size))]
    if name == "decoder.final_layernorm.weight":
        return [WeightRectangle(FINAL_NORM, (0, d), None, 0)]
    match = _LAYER.match(name)
    if match is None:
        raise KeyError(name)
    block, part = f"model.transformer.blocks.{match[1]}", match[2]
    if part == "self_attention.linear_qkv.weight":
        return _qkv_pieces(model, block, share(model.kv_heads))
    if part == "mlp.linear_fc1.weight":
        return [
            rows(f"{block}.ff_proj.weight", share(ff)),
            rows(f"{block}.up_proj.weight", share(ff), ff // tp_size),
        ]
    if part == "self_attention.linear_proj.weight":
        return [
            WeightRectangle(
                f"{block}.attn_out.weight", (0, d), share(model.num_attention_heads * hd), 0
            )
        ]
    if part == "mlp.linear_fc2.weight":
        return [WeightRectangle(f"{block}.ff_out.weight", (0, d), share(ff), 0)]
    norms = {"input_layernorm.weight": "attn_norm", "pre_mlp_layernorm.weight": "ff_norm"}
    return [WeightRectangle(f"{block}.{norms[part]}.weight", (0, d), None, 0)]


def _qkv_pieces(model: ModelSection, block: str, groups: tuple[int, int]) -> list[WeightRectangle]:
    """Megatron's fused QKV: for each query group its query heads, then its key head, then its value
    head.
    """
    d, hd, per_group = (
        model.hidden_size,
        model.head_dim,
        model.num_attention_heads // model.kv_heads,
    )
    found, local = [], 0
    for group in range(*groups):
        for part, first, heads in (
            ("q_proj", group * per_group, per_group),
            ("k_proj", group, 1),
            ("v_proj", group, 1),
        ):
            found.append(
                WeightRectangle(
                    f"{block}.{part}.weight", (first * hd, (first + heads) * hd), (0, d), local
                )
            )
            local += heads * hd
    return found


def parameter_shape(model: ModelSection, name: str) -> tuple[int, ...]:
    """Shape of a whole Megatron parameter."""
    parts = pieces(model, name)
    rows = sum(piece.rows[1] - piece.rows[0] for piece in parts)
    return (rows,) if parts[0].columns is None else (rows, parts[0].columns[1])


def global_names(chunk: torch.nn.Module, layer_offset: int) -> dict[str, torch.nn.Parameter]:
    """Parameters of a model chunk by Megatron name, layers numbered over the whole model."""

    def renumber(name: str) -> str:
        match = _LAYER.match(name)
        return f"decoder.layers.{int(match[1]) + layer_offset}.{match[2]}" if match else name

    return {renumber(name): parameter for name, parameter in chunk.named_parameters()}


def initial_std(model: ModelSection, name: str) -> float:
    """Standard deviation of the published "mitchell" initialisation of a canonical matrix, before
    truncation at 3 sigma.
    """
    match = BLOCK.match(name)
    if match and match[2] == "attn_out":
        return (2 * model.hidden_size * (int(match[1]) + 1)) ** -0.5
    if match and match[2] == "ff_out":
        return (2 * model.ffn_hidden_size * (int(match[1]) + 1)) ** -0.5
    if name == EMBEDDING and model.embedding_init_std is not None:
        return model.embedding_init_std
    return model.hidden_size**-0.5


def initial_values(model: ModelSection, seed: int, piece: WeightRectangle) -> torch.Tensor:
    """The initial values of a piece, float64: ones for norms, else a normal truncated at 3 sigma by
    the inverse of its distribution function, from the Philox streams of (seed, canonical name, row
    block). Independent of the layout.
    """
    first, last = piece.rows
    if piece.columns is None:
        return torch.ones(last - first, dtype=torch.float64)
    width = canonical_shapes(model)[piece.name][1]
    blocks = []
    for block in range(first // INIT_BLOCK_ROWS, -(-last // INIT_BLOCK_ROWS)):
        draws = uniforms(
            stream(seed, f"init/{piece.name}", block), INIT_BLOCK_ROWS * width
        ).reshape(INIT_BLOCK_ROWS, width)
        row = block * INIT_BLOCK_ROWS
        blocks.append(
            torch.from_numpy(draws[max(first - row, 0) : last - row, slice(*piece.columns)])
        )
    low = torch.special.ndtr(torch.tensor(-3.0, dtype=torch.float64))
    quantiles = low + torch.cat(blocks) * (1 - 2 * low)
    return torch.special.ndtri(quantiles) * initial_std(model, piece.name)


def _local_view(parameter: torch.Tensor, piece: WeightRectangle) -> torch.Tensor:
    return parameter[piece.local_row : piece.local_row + piece.rows[1] - piece.rows[0]]


@torch.no_grad()
def initialise(
    model: ModelSection,
    seed: int,
    parameters: Mapping[str, torch.Tensor],
    tp_rank: int = 0,
    tp_size: int = 1,
) -> None:
    """Fill a rank's Megatron parameters (by global name) with the keyed initial values, rounded to
    each one's dtype.
    """
    for name, parameter in parameters.items():
        for piece in pieces(model, name, tp_rank, tp_size):
            _local_view(parameter, piece).copy_(initial_values(model, seed, piece))


def parameter_rows(
    model: ModelSection,
    source: Weights,
    name: str,
    first: int,
    last: int,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> torch.Tensor:
    """Rows `first` to `last` of what a rank holds of a Megatron parameter (by global name), from
    the canonical tensors.
    """
    found = []
    for piece in pieces(model, name, tp_rank, tp_size):
        shift = piece.rows[0] - piece.local_row
        start, stop = max(first, piece.local_row), min(last, piece.rows[1] - shift)
        if start < stop:
            rows = source.rows(piece.name, start + shift, stop + shift)
            found.append(rows if piece.columns is None else rows[:, slice(*piece.columns)])
    return found[0] if len(found) == 1 else torch.cat(found)


@torch.no_grad()
def scatter(
    model: ModelSection,
    source: Weights,
    name: str,
    out: torch.Tensor,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> None:
    """Copy what a rank holds of a Megatron parameter (by global name) from the canonical tensors
    into `out`, of any dtype.
    """
    for first, last in row_blocks(tuple(out.shape), BLOCK_ELEMENTS):
        out[first:last].copy_(parameter_rows(model, source, name, first, last, tp_rank, tp_size))
