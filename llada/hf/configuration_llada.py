# Copyright the llada authors. SPDX-License-Identifier: Apache-2.0
"""The configuration of LLaDA (arXiv 2502.09992) for Hugging Face transformers.

Field names are those of the published config.json.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig

# The published code offers architectures that LLaDA does not use. These are the values it does use,
# and the only ones that modeling_llada.py computes.
_COMPUTED: dict[str, object] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}


class LLaDAConfig(PretrainedConfig):
    """Configuration of a LLaDA model. The defaults are those of the published 8B model.

    Args:
        d_model: Width of the residual stream.
        n_layers: Number of transformer blocks.
        n_heads: Number of query heads. The head dimension is d_model / n_heads.
        n_kv_heads: Number of key/value heads (grouped-query attention). None means n_heads, or 1
            with multi_query_attention.
        multi_query_attention: Older way to state n_kv_heads. Must agree with it if both are given.
        mlp_hidden_size: Inner width of the SwiGLU. None means mlp_ratio * d_model.
        mlp_ratio: Used only if mlp_hidden_size is None.
        vocab_size: Number of token ids.
        embedding_size: Rows of the embedding and the head, padding included. None means vocab_size.
        max_sequence_length: Longest training sequence, in tokens. The model accepts longer inputs.
        rope_theta: Base of the rotary embedding (arXiv 2104.09864).
        rms_norm_eps: Epsilon of every RMSNorm.
        weight_tying: Share one weight between embedding and head. Also available under
            transformers' name, `tie_word_embeddings`.
        mask_token_id: Id of [MASK].
        eos_token_id: Id of the end-of-text token.
        pad_token_id: Id of the padding token.
        predicts_mask_token: False: the model was trained with a softmax without [MASK] (the SUBS
            parameterization of MDLM, arXiv 2406.07524), so the logit of [MASK] is the smallest
            number. Not a published field; written to config.json only if it is false.
        tokenizer_vocab_size: Number of ids of the tokenizer, if it has fewer than vocab_size. Ids
            beyond it are never generated. None means vocab_size. Not a published field; written
            to config.json only if it is set.

    These fields select variants of the published code. Only LLaDA's own value is implemented here,
    and any other is refused: rope, rope_full_precision, alibi, block_type, block_group_size,
    layer_norm_type, layer_norm_with_affine, bias_for_layer_norm, attention_layer_norm,
    input_emb_norm, scale_logits, activation_type, include_bias, include_qkv_bias,
    attention_dropout, embedding_dropout, residual_dropout.

    These fields are kept for other readers of config.json and have no effect here: alibi_bias_max,
    attention_layer_norm_with_affine, flash_attention, init_fn, init_std, init_cutoff_factor,
    init_device, precision, use_cache. New weights always get the "mitchell" initialization, and
    transformers' `attn_implementation` selects the attention kernel.

    Raises:
        ValueError: A value that is not implemented here, or sizes that contradict each other.
    """

    model_type = "llada"
    # No annotation: transformers 5 would turn an annotated attribute into a dataclass field.
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": "n_kv_heads",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        multi_query_attention: bool | None = None,
        mlp_hidden_size: int | None = 12288,
        mlp_ratio: int = 4,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rope: bool = True,
        rope_full_precision: bool = True,
        rope_theta: float = 500000.0,
        alibi: bool = False,
        alibi_bias_max: float = 8.0,
        block_type: str = "llama",
        block_group_size: int = 1,
        layer_norm_type: str = "rms",
        layer_norm_with_affine: bool = True,
        rms_norm_eps: float = 1e-5,
        attention_layer_norm: bool = False,
        attention_layer_norm_with_affine: bool = True,
        bias_for_layer_norm: bool | None = False,
        include_bias: bool = False,
        include_qkv_bias: bool | None = False,
        input_emb_norm: bool = False,
        scale_logits: bool = False,
        activation_type: str = "silu",
        attention_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        weight_tying: bool = False,
        flash_attention: bool = False,
        init_device: str | None = "meta",
        init_fn: str = "mitchell",
        init_std: float = 0.02,
        init_cutoff_factor: float | None = None,
        precision: str | None = "amp_bf16",
        use_cache: bool = False,
        mask_token_id: int | None = 126336,
        eos_token_id: int | None = 126081,
        pad_token_id: int | None = 126081,
        tokenizer_vocab_size: int | None = None,
        predicts_mask_token: bool = True,
        **kwargs: Any,
    ) -> None:
        published = self.published_fields()
        fields = {name: value for name, value in locals().items() if name in published}
        tied = kwargs.pop("tie_word_embeddings", weight_tying)
        if tied != weight_tying:
            raise ValueError(
                f"LLaDAConfig: weight_tying={weight_tying} contradicts tie_word_embeddings={tied}"
            )
        # `trust_remote_code=True` loads the classes that auto_map names from the model's folder.
        kwargs.setdefault("architectures", ["LLaDAModelLM"])
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_llada.LLaDAConfig",
                "AutoModel": "modeling_llada.LLaDAModelLM",
                "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            },
        )
        # transformers 4 replaces these three by its own defaults unless they are passed on.
        super().__init__(
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=weight_tying,
            **kwargs,
        )
        for name, value in fields.items():
            setattr(self, name, value)
        self.tokenizer_vocab_size = tokenizer_vocab_size
        self.predicts_mask_token = predicts_mask_token
        if n_kv_heads is None:
            self.n_kv_heads = 1 if multi_query_attention else n_heads
        if mlp_hidden_size is None:
            self.mlp_hidden_size = mlp_ratio * d_model
        if embedding_size is None:
            self.embedding_size = vocab_size
        self.check()

    @classmethod
    def published_fields(cls) -> list[str]:
        """Names of the fields that every config.json contains."""
        parameters = inspect.signature(cls.__init__).parameters
        unpublished = ("self", "tokenizer_vocab_size", "predicts_mask_token", "kwargs")
        return [name for name in parameters if name not in unpublished]

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to config.json.

        Unlike other configs it includes fields that have their default value, because other readers
        of the file have other defaults.
        """
        fields = super().to_diff_dict()
        fields.update({name: getattr(self, name) for name in self.published_fields()})
        if self.tokenizer_vocab_size is None:
            fields.pop("tokenizer_vocab_size", None)
        if self.predicts_mask_token:
            fields.pop("predicts_mask_token", None)
        return fields

    def check(self) -> None:
        """Raise ValueError if modeling_llada.py does not implement this configuration."""
        wrong = []
        for name, computed in _COMPUTED.items():
            # null stands for false in the published optional switches
            value = getattr(self, name) or type(computed)()
            if value != computed:
                wrong.append(f"{name}={value!r} (only {computed!r})")
        if wrong:
            raise ValueError(
                f"LLaDAConfig: this implementation does not compute {', '.join(wrong)}"
            )
        self._check_attention_heads()
        self._check_vocabulary()

    def _check_attention_heads(self) -> None:
        # Rotary embeddings rotate pairs of channels, so the head dimension must be even.
        if self.d_model % self.n_heads or self.d_model // self.n_heads % 2:
            raise ValueError(
                f"LLaDAConfig: d_model={self.d_model} is not n_heads={self.n_heads} times an even"
                " head dimension"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"LLaDAConfig: n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}"
            )
        if self.multi_query_attention is None:
            return
        implied = 1 if self.multi_query_attention else self.n_heads
        if self.n_kv_heads != implied:
            raise ValueError(
                f"LLaDAConfig: n_kv_heads={self.n_kv_heads} contradicts"
                f" multi_query_attention={self.multi_query_attention}"
            )

    def _check_vocabulary(self) -> None:
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"LLaDAConfig: embedding_size={self.embedding_size} is less than"
                f" vocab_size={self.vocab_size}"
            )
        if self.tokenizer_vocab_size is None:
            return
        if not 0 < self.tokenizer_vocab_size <= self.embedding_size:
            raise ValueError(
                f"LLaDAConfig: tokenizer_vocab_size={self.tokenizer_vocab_size} is not from 1 to"
                f" embedding_size={self.embedding_size}"
            )
