"""config.json of published LLaDA, Llama and Mistral -> our model section.

A config that asks for anything that our model does not compute is refused, field by field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from pydantic import ValidationError

from llada.config.sections import ModelSection
from llada.types import JsonObject

LLADA = "LLaDAModelLM"


# Fields of a config.json that do not affect the hidden states.
_METADATA_FIELDS = (
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_type",
    "torch_dtype",
    "tokenizer_vocab_size",
    "predicts_mask_token",
    "_name_or_path",
)

# Fields that every config of transformers has, with the only value that is computed here: the
# default.
_TRANSFORMERS_DEFAULTS: JsonObject = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}

# Fields that `to_dict()` of a config writes in transformers 4.46 and no longer in 5. They are about
# training and autoregressive decoding; none of them changes what the model computes.
_TRANSFORMERS_4_FIELDS = (
    "finetuning_task",
    "tf_legacy_loss",
    "torchscript",
    "use_bfloat16",
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "problem_type",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "_attn_implementation_autoset",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
)

# Fields of published LLaDA that a config.json must contain: their defaults in the class belong to
# another architecture.
_LLADA_REQUIRED = (
    "d_model",
    "n_layers",
    "n_heads",
    "vocab_size",
    "max_sequence_length",
    "block_type",
    "layer_norm_type",
    "activation_type",
    "rope",
    "rope_theta",
    "rms_norm_eps",
    "weight_tying",
    "include_bias",
)
_LLADA_COUNTS = (
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "mlp_hidden_size",
    "mlp_ratio",
    "vocab_size",
    "embedding_size",
    "max_sequence_length",
)

_LLAMA_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_LLAMA_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "max_position_embeddings",
)

# Defaults of transformers' own classes. transformers 4 does not write a field that has its default.
_LLAMA_DEFAULTS: JsonObject = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_MISTRAL_DEFAULTS: JsonObject = {
    **_LLAMA_DEFAULTS,
    "max_position_embeddings": 4096 * 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


class UnsupportedConfig(Exception):
    """The config describes a model that is not computed here; the message names the field."""


class MappedConfig(NamedTuple):
    """Result of mapping a config.

    Attributes:
        model: Our model section.
        max_sequence_length: Longest sequence that the model was trained on, in tokens.
    """

    model: ModelSection
    max_sequence_length: int


class ConfigReader(NamedTuple):
    """How to read the configs of one model_type.

    Attributes:
        architecture: The only class whose weight files have the names that we read.
        map_config: Maps a config. Raises UnsupportedConfig.
    """

    architecture: str
    map_config: Callable[[JsonObject], MappedConfig]


def check_common_fields(config: JsonObject) -> None:
    """Raise UnsupportedConfig if a field that all configs share asks for another computation."""
    # A field that is null or missing has its default.
    fields = [(name, config.get(name), only) for name, only in _TRANSFORMERS_DEFAULTS.items()]
    _refuse_other_values(field for field in fields if field[1] is not None)
    if config.get("quantization_config"):
        raise UnsupportedConfig(
            "quantization_config: quantized weights are not read; take the original ones"
        )


def map_llada(config: JsonObject) -> MappedConfig:
    """Map the published LLaDA configuration."""
    from llada.hf.configuration_llada import LLaDAConfig

    _require(config, _LLADA_REQUIRED)
    if config.get("mlp_hidden_size") is None:
        _require(config, ("mlp_ratio",))
    _check_positive(config, counts=_LLADA_COUNTS, reals=("rope_theta", "rms_norm_eps"))
    _refuse_unknown_fields(config)
    # LLaDAConfig refuses the architectures of the published code that LLaDA does not use. A missing
    # mlp_hidden_size means mlp_ratio * d_model here, not the default of the class.
    fields: JsonObject = {"mlp_hidden_size": None}
    fields |= {name: config[name] for name in LLaDAConfig.published_fields() if name in config}
    try:
        published = LLaDAConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UnsupportedConfig(str(error)) from None
    model = _model_section(
        num_layers=published.n_layers,
        hidden_size=published.d_model,
        num_attention_heads=published.n_heads,
        num_query_groups=_query_groups(published.n_heads, published.n_kv_heads),
        ffn_hidden_size=published.mlp_hidden_size,
        vocab_size=published.embedding_size,
        rope_theta=float(published.rope_theta),
        norm_eps=published.rms_norm_eps,
        tie_embeddings=published.weight_tying,
    )
    return MappedConfig(model, int(published.max_sequence_length))


def map_llama(config: JsonObject) -> MappedConfig:
    """Map Llama's configuration (arXiv 2302.13971)."""
    return _map_llama_like(config, _LLAMA_DEFAULTS)


def map_mistral(config: JsonObject) -> MappedConfig:
    """Map Mistral's configuration (arXiv 2310.06825): Llama's fields with other defaults."""
    return _map_llama_like(config, _MISTRAL_DEFAULTS)


READERS: Mapping[str, ConfigReader] = {
    "llada": ConfigReader(LLADA, map_llada),
    "llama": ConfigReader("LlamaForCausalLM", map_llama),
    "mistral": ConfigReader("MistralForCausalLM", map_mistral),
}
"""By model_type."""


def _map_llama_like(given: JsonObject, defaults: JsonObject) -> MappedConfig:
    """Map a config with Llama's field names; `defaults` are those of its class in transformers."""
    _require(given, _LLAMA_REQUIRED)
    config = {"num_key_value_heads": given["num_attention_heads"], **defaults, **given}
    rope = _rope_parameters(config)
    if rope.get("rope_theta") is not None:
        config["rope_theta"] = rope["rope_theta"]
    _check_positive(config, counts=_LLAMA_COUNTS, reals=("rope_theta", "rms_norm_eps"))
    _require(config, ("max_position_embeddings", "rope_theta", "rms_norm_eps"))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    partial_rotary = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    _refuse_other_values(
        (
            ("hidden_act", config["hidden_act"], "silu"),
            ("attention_bias", config.get("attention_bias") or False, False),
            ("mlp_bias", config.get("mlp_bias") or False, False),
            ("sliding_window", config["sliding_window"], None),
            # "type" is the older name of "rope_type".
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
            ("partial_rotary_factor", partial_rotary, 1.0),
            ("head_dim x num_attention_heads", head_dim * heads, config["hidden_size"]),
        )
    )
    model = _model_section(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=_query_groups(heads, config["num_key_value_heads"] or heads),
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        rope_theta=float(config["rope_theta"]),
        norm_eps=float(config["rms_norm_eps"]),
        tie_embeddings=config["tie_word_embeddings"],
    )
    return MappedConfig(model, config["max_position_embeddings"])


def _rope_parameters(config: JsonObject) -> JsonObject:
    """The settings of the rotary embedding; transformers 5 renamed the field."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UnsupportedConfig(f"rope_parameters: {rope!r} is not an object")
    return rope


def _query_groups(heads: int, kv_heads: int) -> int | None:
    """model.num_query_groups, which is None without grouped-query attention."""
    return None if kv_heads == heads else kv_heads


def _model_section(**sizes: object) -> ModelSection:
    try:
        return ModelSection.model_validate(sizes)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        setting = ".".join(map(str, first["loc"]))
        raise UnsupportedConfig(f"{setting}: {first['input']!r}: {first['msg']}") from None


def _require(config: JsonObject, names: Iterable[str]) -> None:
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise UnsupportedConfig(
            f"missing {', '.join(missing)}; without it the file describes another model"
        )


def _check_positive(config: JsonObject, counts: Iterable[str], reals: Iterable[str]) -> None:
    """Raise UnsupportedConfig unless counts are positive integers and reals positive numbers.

    Fields that are missing or null are skipped.
    """
    for names, types, noun in ((counts, (int,), "integer"), (reals, (int, float), "number")):
        for name in names:
            value = config.get(name)
            if value is None:
                continue
            # JSON's true is an instance of int in Python.
            is_number = isinstance(value, types) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise UnsupportedConfig(f"{name}: {value!r} is not a positive {noun}")


def _refuse_unknown_fields(config: JsonObject) -> None:
    """Raise UnsupportedConfig for unknown fields, unless they are null or false."""
    from transformers import PretrainedConfig

    from llada.hf.configuration_llada import LLaDAConfig

    known = {
        *LLaDAConfig.published_fields(),
        *LLaDAConfig.attribute_map,
        *PretrainedConfig().to_dict(),
        *_TRANSFORMERS_DEFAULTS,
        *_TRANSFORMERS_4_FIELDS,
        *_METADATA_FIELDS,
    }
    unknown = []
    for name, value in config.items():
        if name not in known and value not in (None, False):
            unknown.append(f"{name} {value!r}")
    if unknown:
        raise UnsupportedConfig(f"not known here, so not computed: {', '.join(unknown)}")


def _refuse_other_values(fields: Iterable[tuple[str, object, object]]) -> None:
    """Raise UnsupportedConfig for every (name, value, only computed value) whose value differs."""
    wrong = [f"{name} {value!r} (only {only!r})" for name, value, only in fields if value != only]
    if wrong:
        raise UnsupportedConfig(f"not computed here: {', '.join(wrong)}")
