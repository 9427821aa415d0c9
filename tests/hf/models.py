"""Small exported models with random weights, and how two results are compared."""

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
    """Norm weights away from 1, so that a norm whose weight is not used shows."""
    torch.manual_seed(0)
    shapes = canonical_shapes(model)
    return {
        n: torch.rand(s) + 0.5 if len(s) == 1 else torch.randn(s) / math.sqrt(s[1])
        for n, s in shapes.items()
    }


def made(**settings: Any) -> LLaDAModelLM:
    model = section(**settings)
    hf = LLaDAModelLM(hf_config(model))
    hf.load_state_dict(random_weights(model))
    return hf.eval()


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_near(got: torch.Tensor, wanted: torch.Tensor, relative: float = 1e-5) -> None:
    assert (got - wanted).abs().max() <= relative * wanted.abs().max()


def gradients(
    hf: LLaDAModelLM, inputs: torch.Tensor, direction: torch.Tensor
) -> dict[str, torch.Tensor]:
    hf.zero_grad()
    (hf(inputs).logits * direction).sum().backward()
    return {name: p.grad.clone() for name, p in hf.named_parameters()}


def noisy_batch(prompt: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy ids, clean ids and p_mask [b, s]; the first tokens are not labelled."""
    clean, chance = tokens(3, 12) % 126, torch.tensor([0.9, 0.5, 0.2])[:, None].expand(3, 12)
    masked = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < chance
    noisy = torch.where(masked, 126, clean)
    labels = clean.clone()
    labels[:, :prompt] = -100
    return noisy, labels, chance
