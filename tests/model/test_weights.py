"""The weight map and the keyed initialization."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.config.sections import ModelSection
from llada.model import weights
from tests.model.assembly import gather
from tests.model.in_memory import InMemory

MODEL = ModelSection(
    num_layers=2,
    hidden_size=128,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=192,
    vocab_size=256,
)


def megatron_shapes(model: ModelSection, tp: int) -> dict[str, tuple[int, ...]]:
    d, ff, hd = model.hidden_size, model.ffn_hidden_size, model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (model.vocab_size // tp, d),
        "decoder.final_layernorm.weight": (d,),
    }
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (model.vocab_size // tp, d)
    for layer in range(model.num_layers):
        p = f"decoder.layers.{layer}"
        shapes |= {
            f"{p}.input_layernorm.weight": (d,),
            f"{p}.self_attention.linear_qkv.weight": (
                (model.num_attention_heads + 2 * model.kv_heads) * hd // tp,
                d,
            ),
            f"{p}.self_attention.linear_proj.weight": (d, d // tp),
            f"{p}.pre_mlp_layernorm.weight": (d,),
            f"{p}.mlp.linear_fc1.weight": (2 * ff // tp, d),
            f"{p}.mlp.linear_fc2.weight": (d, ff // tp),
        }
    return shapes


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_scatter_and_gather_are_inverse_and_cover_every_element(tp: int, tied: bool) -> None:
    model = MODEL.model_copy(update={"tie_embeddings": tied})
    canonical = {
        name: torch.randn(shape) for name, shape in weights.canonical_shapes(model).items()
    }
    ranks = [
        {name: torch.full(shape, math.nan) for name, shape in megatron_shapes(model, tp).items()}
        for _ in range(tp)
    ]
    for rank, parameters in enumerate(ranks):
        for name, parameter in parameters.items():
            weights.scatter(model, InMemory(canonical), name, parameter, rank, tp)
        assert not any(value.isnan().any() for value in parameters.values())
    back = gather(model, [(parameters, rank, tp) for rank, parameters in enumerate(ranks)])
    assert back.keys() == canonical.keys()
    assert all(torch.equal(back[name], canonical[name]) for name in canonical)


@pytest.mark.parametrize("tp", [2, 4])
def test_every_shard_starts_from_the_same_values(tp: int) -> None:
    one = {name: torch.empty(shape) for name, shape in megatron_shapes(MODEL, 1).items()}
    weights.initialize(MODEL, 9, one)
    whole = gather(MODEL, [(one, 0, 1)])
    ranks = []
    for rank in range(tp):
        parameters = {
            name: torch.empty(shape) for name, shape in megatron_shapes(MODEL, tp).items()
        }
        weights.initialize(MODEL, 9, parameters, rank, tp)
        ranks.append((parameters, rank, tp))
    sharded = gather(MODEL, ranks)
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 191), st.integers(1, 192), st.integers(0, 127), st.integers(1, 128))
def test_a_rectangle_holds_the_values_of_the_whole(
    r0: int, height: int, c0: int, width: int
) -> None:
    name = "model.transformer.blocks.1.ff_proj.weight"
    whole = weights.initial_values(MODEL, 3, weights.WeightRectangle(name, (0, 192), (0, 128), 0))
    rows, columns = (r0, min(192, r0 + height)), (c0, min(128, c0 + width))
    part = weights.initial_values(MODEL, 3, weights.WeightRectangle(name, rows, columns, 0))
    assert torch.equal(part, whole[slice(*rows), slice(*columns)])


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("model.transformer.wte.weight", 128**-0.5),
        ("model.transformer.ff_out.weight", 128**-0.5),
        ("model.transformer.blocks.0.q_proj.weight", 128**-0.5),
        ("model.transformer.blocks.1.up_proj.weight", 128**-0.5),
        ("model.transformer.blocks.0.attn_out.weight", (2 * 128 * 1) ** -0.5),
        ("model.transformer.blocks.1.attn_out.weight", (2 * 128 * 2) ** -0.5),
        ("model.transformer.blocks.1.ff_out.weight", (2 * 192 * 2) ** -0.5),
    ],
)
def test_mitchell_initialization(name: str, std: float) -> None:
    """Normal truncated at 3 sigma: bounded, mean 0, and the truncated distribution's variance and
    fourth moment.
    """
    shape = weights.canonical_shapes(MODEL)[name]
    values = (
        weights.initial_values(
            MODEL, 0, weights.WeightRectangle(name, (0, shape[0]), (0, shape[1]), 0)
        )
        / std
    )
    n = values.numel()
    density = math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2))
    variance = 1 - 6 * density
    fourth = 3 * variance - 2 * 27 * density
    assert values.abs().max() <= 3
    assert abs(values.mean()) < 4.5 * math.sqrt(variance / n)
    assert abs(values.square().mean() - variance) < 4.5 * math.sqrt((fourth - variance**2) / n)
    assert abs(
        torch.corrcoef(torch.stack([values[:-1].flatten(), values[1:].flatten()]))[0, 1]
    ) < 4.5 / math.sqrt(n)


def test_another_embedding_scale_changes_the_embedding_alone() -> None:
    wide = MODEL.model_copy(update={"embedding_init_std": 1.0})
    for name, shape in weights.canonical_shapes(MODEL).items():
        piece = weights.WeightRectangle(
            name, (0, shape[0]), (0, shape[1]) if len(shape) > 1 else None, 0
        )
        factor = 128**0.5 if name.endswith("wte.weight") else 1.0
        torch.testing.assert_close(
            weights.initial_values(wide, 0, piece), weights.initial_values(MODEL, 0, piece) * factor
        )


def test_norms_start_at_one_and_seeds_and_names_differ() -> None:
    assert (
        weights.initial_values(
            MODEL, 0, weights.WeightRectangle("model.transformer.ln_f.weight", (0, 128), None, 0)
        )
        == 1
    ).all()

    def first(seed: int, name: str) -> float:
        return float(
            weights.initial_values(
                MODEL,
                seed,
                weights.WeightRectangle(
                    f"model.transformer.blocks.0.{name}.weight", (0, 1), (0, 1), 0
                ),
            )
        )

    assert (
        len({first(0, "q_proj"), first(1, "q_proj"), first(0, "k_proj"), first(0, "v_proj")}) == 4
    )


def test_unknown_parameter() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        weights.rectangles(MODEL, "nonsense")
