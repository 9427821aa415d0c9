"""A Hugging Face folder as a model of ours: published LLaDA, and Llama-architecture models as where
diffusion can start from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from llada.checkpoint.canonical import shape_differences
from llada.config.sections import ModelSection
from llada.errors import UserError, did_you_mean
from llada.hf.sources import Renamed, equal
from llada.hf.tensor_files import TensorFiles, open_tensors
from llada.model.weights import BLOCK, EMBEDDING, FINAL_NORM, HEAD, Weights, canonical_shapes
from llada.tokenizer import Tokenizer

LLADA = "LLaDAModelLM"
_LLAMA_BLOCK = {
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
_LLAMA = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    HEAD: "lm_head.weight",
}
_COMPUTED = (".rotary_emb.inv_freq",)
"""Endings of tensors that older files hold although they follow from the config."""


@dataclass(frozen=True)
class HfFolder:
    """What a folder holds.

    Attributes:
        path: of the folder.
        architecture: as its config names it.
        model: its shape.
        weights: by canonical name.
        longest: sequence it was trained on, in tokens.
        mask_id: of [MASK] as config.json says; None: it does not say.
    """

    path: Path
    architecture: str
    model: ModelSection
    weights: Weights
    longest: int
    mask_id: int | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every tensor without rounding."""
        found = {self.weights.dtype(name) for name in self.weights.shapes}
        return found.pop() if len(found) == 1 else torch.float32


def check_mask(folder: HfFolder, tokenizer: Tokenizer) -> None:
    """Raises UserError where config.json and the tokenizer name different mask tokens: one of them
    is not this model's.
    """
    if folder.mask_id is not None and folder.mask_id != tokenizer.mask_id:
        raise UserError(
            f"{folder.path / 'config.json'}: mask_token_id {folder.mask_id} is not the tokenizer's"
            f" mask token, {tokenizer.mask_id}"
        )


def is_folder(path: str | Path) -> bool:
    """Whether this is a Hugging Face folder and no checkpoint."""
    return os.path.isfile(Path(path) / "config.json")  # False too for a name that no file can have


class ReadModel(NamedTuple):
    """What a folder's config.json says; see HfFolder."""

    architecture: str
    model: ModelSection
    longest: int
    mask_id: int | None


def read_model(path: str | Path, setting: str = "FOLDER") -> ReadModel:
    """Read config.json alone. Raises UserError as `open_folder` does."""
    folder = Path(path)
    if not is_folder(folder):
        raise UserError(f"{setting}: '{path}' is no Hugging Face folder (it has no config.json)")
    config = _read_config(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind not in _READERS:
        near = did_you_mean(kind, _READERS)
        raise UserError(
            f"{folder / 'config.json'}: model_type {kind!r} is not read{near}; one of"
            f" {', '.join(_READERS)}"
        )
    read, wanted = _READERS[kind]
    try:
        _check_transformers_fields(config)
        if config.get("quantization_config"):
            raise _Unsuitable(
                "quantization_config: quantized weights are not read; take the original ones"
            )
        named = config.get("architectures") or [wanted]
        if named != [wanted]:
            raise _Unsuitable(
                f"architectures {named!r} is not read with model_type {kind!r}; {[wanted]!r} is"
            )
        model, longest = read(config)
    except _Unsuitable as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    return ReadModel(wanted, model, longest, config.get("mask_token_id"))


def open_folder(path: str | Path, allow_pickle: bool = False, setting: str = "FOLDER") -> HfFolder:
    """Open a folder; weights are read when they are asked for.

    Args:
        path: of the folder.
        allow_pickle: read pytorch_model.bin where there are no safetensors.
        setting: what the user calls `path`, for messages.

    Raises:
        UserError: no such folder, an architecture or setting that is not computed here, weights
            that cannot be read (see `open_tensors`) or that are not those of the config: every
            missing and surplus tensor and every other shape is named.
    """
    read = read_model(path, setting)
    folder, model = Path(path), read.model
    files = open_tensors(folder, allow_pickle, setting)
    if model.num_layers > len(files.shapes):  # too many to list
        raise UserError(
            f"{setting}: the weights in '{folder}' are not those of its config.json: "
            f"it has {model.num_layers} layers, and there are {len(files.shapes)} tensors"
        )
    names = {
        name: name if read.architecture == LLADA else _llama_name(name)
        for name in canonical_shapes(model)
    }
    _check(folder, files, names, model, setting)
    return HfFolder(
        folder, read.architecture, model, Renamed(files, names), read.longest, read.mask_id
    )


class _Unsuitable(Exception):
    """A config that is not of a model that is computed here."""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _section(**sizes: Any) -> ModelSection:
    try:
        return ModelSection.model_validate(sizes)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _Unsuitable(
            f"{'.'.join(map(str, first['loc']))}: {first['input']!r}: {first['msg']}"
        ) from None


def _require(config: dict[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise _Unsuitable(
            f"missing {', '.join(missing)}; without it the file describes another model"
        )


def _check_numbers(config: dict[str, Any], counts: tuple[str, ...], reals: tuple[str, ...]) -> None:
    """Counts must be whole and positive, reals positive; a field that is not there or null is for
    others to judge.
    """
    for name in (*counts, *reals):
        value = config.get(name)
        kinds = int if name in counts else (int, float)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf")
        ):
            raise _Unsuitable(
                f"{name}: {value!r} is not a positive {'integer' if name in counts else 'number'}"
            )


def _check_transformers_fields(config: dict[str, Any]) -> None:
    """Fields of transformers' own that would change what is computed must have their defaults."""
    wrong = [
        f"{name} {config[name]!r} (only {only!r})"
        for name, only in _NOT_COMPUTED.items()
        if config.get(name) not in (None, only)
    ]
    if wrong:
        raise _Unsuitable(f"not computed here: {', '.join(wrong)}")


def _llada(config: dict[str, Any]) -> tuple[ModelSection, int]:
    """The published configuration. Its class has the defaults of another architecture, so a field
    that is left out is no LLaDA.
    """
    from transformers import PretrainedConfig

    from llada.hf.configuration_llada import LLaDAConfig

    required = (
        "d_model",
        "n_layers",
        "n_heads",
        "vocab_size",
        "max_sequence_length",
        "block_type",
        "layer_norm_type",
        "activation_type",
    )
    _require(
        config, (*required, "rope", "rope_theta", "rms_norm_eps", "weight_tying", "include_bias")
    )
    if config.get("mlp_hidden_size") is None:
        _require(config, ("mlp_ratio",))
    counts = (
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "mlp_hidden_size",
        "mlp_ratio",
        "vocab_size",
        "embedding_size",
    )
    _check_numbers(config, (*counts, "max_sequence_length"), ("rope_theta", "rms_norm_eps"))
    fields = LLaDAConfig.published_fields()
    harmless = {
        *fields,
        *PretrainedConfig().to_dict(),
        *_OLDER_FIELDS,
        *_NOT_COMPUTED,
        *LLaDAConfig.attribute_map,
        *_BESIDE,
    }
    unknown = [
        f"{name} {value!r}"
        for name, value in config.items()
        if name not in harmless and value not in (None, False)
    ]
    if unknown:
        raise _Unsuitable(f"not known here, so not computed: {', '.join(unknown)}")
    try:
        whole = LLaDAConfig(
            **{"mlp_hidden_size": None, **{name: config[name] for name in fields if name in config}}
        )
    except (ValueError, TypeError) as error:
        raise _Unsuitable(str(error)) from None
    model = _section(
        num_layers=whole.n_layers,
        hidden_size=whole.d_model,
        num_attention_heads=whole.n_heads,
        num_query_groups=None if whole.n_kv_heads == whole.n_heads else whole.n_kv_heads,
        ffn_hidden_size=whole.mlp_hidden_size,
        vocab_size=whole.embedding_size,
        rope_theta=float(whole.rope_theta),
        norm_eps=whole.rms_norm_eps,
        tie_embeddings=whole.weight_tying,
    )
    return model, int(whole.max_sequence_length)


def _llama(given: dict[str, Any], **own_defaults: Any) -> tuple[ModelSection, int]:
    """Llama's configuration (arXiv 2302.13971); what is left out has the default of transformers'
    class.
    """
    _require(
        given,
        (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        ),
    )
    config = {
        **_LLAMA_DEFAULTS,
        "num_key_value_heads": given["num_attention_heads"],
        **own_defaults,
        **given,
    }
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _Unsuitable(f"rope_parameters: {rope!r} is not an object")
    if rope.get("rope_theta") is not None:
        config["rope_theta"] = rope["rope_theta"]
    counts = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    _check_numbers(
        config, (*counts, "head_dim", "max_position_embeddings"), ("rope_theta", "rms_norm_eps")
    )
    _require(config, ("max_position_embeddings", "rope_theta", "rms_norm_eps"))
    heads = config["num_attention_heads"]
    only: dict[str, tuple[Any, Any]] = {
        "hidden_act": (config["hidden_act"], "silu"),
        "attention_bias": (config.get("attention_bias") or False, False),
        "mlp_bias": (config.get("mlp_bias") or False, False),
        "sliding_window": (config["sliding_window"], None),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (
            config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)),
            1.0,
        ),
        "head_dim x num_attention_heads": (
            (config.get("head_dim") or config["hidden_size"] // heads) * heads,
            config["hidden_size"],
        ),
    }
    wrong = [
        f"{name} {found!r} (only {allowed!r})"
        for name, (found, allowed) in only.items()
        if found != allowed
    ]
    if wrong:
        raise _Unsuitable(f"not computed here: {', '.join(wrong)}")
    groups = config["num_key_value_heads"] or heads
    model = _section(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=None if groups == heads else groups,
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        rope_theta=float(config["rope_theta"]),
        norm_eps=float(config["rms_norm_eps"]),
        tie_embeddings=config["tie_word_embeddings"],
    )
    return model, config["max_position_embeddings"]


def _mistral(config: dict[str, Any]) -> tuple[ModelSection, int]:
    """Mistral's configuration (arXiv 2310.06825): Llama's with defaults of its own."""
    return _llama(
        config, num_key_value_heads=8, sliding_window=4096, max_position_embeddings=4096 * 32
    )


_BESIDE = (
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_type",
    "torch_dtype",
    "tokenizer_vocab_size",
    "_name_or_path",
)
"""Fields of a published config.json that say nothing about what is computed."""
_NOT_COMPUTED: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
"""Fields of every config of transformers, with the only value that is computed here: the default.
"""
_OLDER_FIELDS = (
    *(
        "finetuning_task",
        "tf_legacy_loss",
        "torchscript",
        "use_bfloat16",
        "output_attentions",
        "output_hidden_states",
    ),
    *(
        "prefix",
        "problem_type",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "_attn_implementation_autoset",
    ),
    *(
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
    ),
    *(
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
    ),
    *(
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
    ),
    *(
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "remove_invalid_values",
    ),
    "exponential_decay_length_penalty",
)
"""What `to_dict()` of a config writes in transformers 4.46 and no longer in 5: about training, and
about text from left to right. None of it says what the model computes.
"""
_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_READERS: Mapping[str, tuple[Callable[[dict[str, Any]], tuple[ModelSection, int]], str]] = {
    "llada": (_llada, LLADA),
    "llama": (_llama, "LlamaForCausalLM"),
    "mistral": (_mistral, "MistralForCausalLM"),
}
"""model_type -> how to read the config, and the only class whose files have these tensors."""


def _llama_name(canonical: str) -> str:
    match = BLOCK.match(canonical)
    return (
        f"model.layers.{match[1]}.{_LLAMA_BLOCK[match[2]]}.weight" if match else _LLAMA[canonical]
    )


def _check(
    folder: Path, files: TensorFiles, names: dict[str, str], model: ModelSection, setting: str
) -> None:
    """Compare names and shapes with those of the config's model."""
    wanted = {names[canonical]: shape for canonical, shape in canonical_shapes(model).items()}
    found = {name: shape for name, shape in files.shapes.items() if not name.endswith(_COMPUTED)}
    for head, embedding in (
        (HEAD, EMBEDDING),
        (_LLAMA[HEAD], _LLAMA[EMBEDDING]),
    ):  # some files of tied models hold both
        if (
            model.tie_embeddings
            and head in found
            and embedding in found
            and equal(files, head, embedding)
        ):
            del found[head]
    problems = shape_differences(found, wanted)
    if problems:
        raise UserError(
            f"{setting}: the weights in '{folder}' are not those of its config.json: {problems}"
        )
