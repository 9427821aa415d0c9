"""The layout of LlamaForCausalLM: names of its tensors and its config.json.

Our transformer computes what Llama's does once its attention is causal, so an autoregressive model
is exported as one, and Llama's weights can start a diffusion model.
"""

from __future__ import annotations

import torch

from llada.checkpoint.format import TrainedConfig
from llada.model.weights import BLOCK, EMBEDDING, FINAL_NORM, HEAD
from llada.types import JsonObject

ARCHITECTURE = "LlamaForCausalLM"

# Llama's names of the tensors of a block, by ours.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
# Llama's names of the other tensors, by ours.
NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    HEAD: "lm_head.weight",
}


def llama_name(canonical: str) -> str:
    """Return Llama's name of a tensor."""
    match = BLOCK.match(canonical)
    if match is None:
        return NAMES[canonical]
    layer, part = match.groups()
    return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"


def llama_config(
    trained: TrainedConfig, start_id: int, eos_id: int, pad_id: int, dtype: torch.dtype
) -> JsonObject:
    """Return config.json of a LlamaForCausalLM.

    Args:
        trained: the model.
        start_id: token id that begins a text.
        eos_id: token id that ends one.
        pad_id: token id that fills rows of unequal length.
        dtype: of the weights.
    """
    model = trained.model
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": trained.longest,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "initializer_range": 0.02,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "bos_token_id": start_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
