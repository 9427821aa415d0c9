"""Small exported models with random weights, and the comparison of results."""

from __future__ import annotations

import math
from typing import Any

import torch

from llada.config.sections import ModelSection
from llada.hf.configuration_llada import LLaDAConfig
from llada.hf.modeling_llada import LLaDAModelLM
from llada.model.weights import canonical_shapes

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_query_groups": 2},
    "tied": {"num_query_groups": 2, "tie_embeddings": True},
}


def section(**settings: Any) -> ModelSection:
    sizes = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "vocab_size": 128,
    }
    return ModelSection(**{**sizes, **settings})


def hf_config(model: ModelSection, **settings: Any) -> LLaDAConfig:
    return LLaDAConfig(
        d_model=model.hidden_size,
        n_layers=model.num_layers,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.kv_heads,
        mlp_hidden_size=model.ffn_hidden_size,
        vocab_size=model.vocab_size,
        rms_norm_eps=model.norm_eps,
        weight_tying=model.tie_embeddings,
        **{
            "rope_theta": model.rope_theta,
            "mask_token_id": 126,
            "eos_token_id": 1,
            "pad_token_id": 1,
            **settings,
        },
    )


def random_weights(model: ModelSection) -> dict[str, torch.Tensor]:
    """Random weights. Norms are away from 1, so that a norm without its weight is noticed."""
    torch.manual_seed(0)
    shapes = canonical_shapes(model)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.rand(shape) + 0.5
        else:
            weights[name] = torch.randn(shape) / math.sqrt(shape[1])
    return weights


def made(**settings: Any) -> LLaDAModelLM:
    model = section(**settings)
    hf = LLaDAModelLM(hf_config(model))
    hf.load_state_dict(random_weights(model))
    return hf.eval()


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def gradients(
    hf: LLaDAModelLM, inputs: torch.Tensor, direction: torch.Tensor
) -> dict[str, torch.Tensor]:
    hf.zero_grad()
    (hf(inputs).logits * direction).sum().backward()
    return {name: p.grad.clone() for name, p in hf.named_parameters()}


def noisy_batch(prompt: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy ids, clean ids and p_mask, each [b, s]; the first `prompt` tokens have no label."""
    clean = tokens(3, 12) % 126
    p_mask = torch.tensor([0.9, 0.5, 0.2])[:, None].expand(3, 12)
    masked = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < p_mask
    noisy = torch.where(masked, 126, clean)
    labels = clean.clone()
    labels[:, :prompt] = -100
    return noisy, labels, p_mask
