"""Makes Hugging Face folders without this package's code.

They are in the published layout, from plain tensors, or transformers' own Llama.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llada.config.sections import ModelSection
from llada.tokenizer import Tokenizer

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "vocab_size": 512,
}


PUBLISHED_8B = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
"""The config.json of LLaDA-8B-Instruct without its dtype, whose spelling differs between versions
of transformers."""


def published_config(model: ModelSection, tokenizer: Tokenizer) -> dict[str, Any]:
    """The published config.json with other sizes."""
    return {
        **PUBLISHED_8B,
        "d_model": model.hidden_size,
        "embedding_size": model.vocab_size,
        "eos_token_id": tokenizer.eos_id,
        "mask_token_id": tokenizer.mask_id,
        "mlp_hidden_size": model.ffn_hidden_size,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_query_groups or model.num_attention_heads,
        "n_layers": model.num_layers,
        "pad_token_id": tokenizer.eos_id,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "transformers_version": "4.46.3",
        "vocab_size": model.vocab_size,
        "weight_tying": model.tie_embeddings,
    }


def published_tensors(model: ModelSection, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published names.

    Norms are away from 1 and matrices of unit gain, so that every tensor affects the logits. Names
    and shapes are written out again here, and not taken from the package.
    """
    draw = torch.Generator().manual_seed(seed)
    d = model.hidden_size
    ff = model.ffn_hidden_size
    kv = model.kv_heads * model.head_dim
    v = model.vocab_size
    matrices = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "attn_out": (d, d)}
    matrices |= {"ff_proj": (ff, d), "up_proj": (ff, d), "ff_out": (d, ff)}

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) / columns**0.5

    tensors = {
        "model.transformer.wte.weight": matrix(v, d),
        "model.transformer.ln_f.weight": torch.rand(d, generator=draw) + 0.5,
    }
    for i in range(model.num_layers):
        for name, shape in matrices.items():
            tensors[f"model.transformer.blocks.{i}.{name}.weight"] = matrix(*shape)
        for name in ("attn_norm", "ff_norm"):
            tensors[f"model.transformer.blocks.{i}.{name}.weight"] = (
                torch.rand(d, generator=draw) + 0.5
            )
    if not model.tie_embeddings:
        tensors["model.transformer.ff_out.weight"] = matrix(v, d)
    return tensors


def published_folder(
    folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, files: int = 1, **sizes: Any
) -> dict[str, torch.Tensor]:
    """Write a folder in the published layout and return its tensors.

    With `files` > 1 it has an index.
    """
    model = ModelSection(**{**SIZES, **sizes})
    tensors = {name: tensor.to(dtype) for name, tensor in published_tensors(model).items()}
    shutil.copytree(tokenizer, folder)
    (folder / "config.json").write_text(
        json.dumps(published_config(model, Tokenizer.load(tokenizer)))
    )
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    index = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::files]}
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return tensors


def llama_folder(folder: Path, tokenizer: Path, **fields: Any) -> torch.nn.Module:
    """Write transformers' own Llama, causal and with its own names, with a tokenizer.

    Returns:
        The model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(**{**sizes, "vocab_size": 500, "max_position_embeddings": 256, **fields})
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    shutil.copytree(tokenizer, folder)
    model.save_pretrained(folder)
    return model
