# Copyright the llada authors. SPDX-License-Identifier: Apache-2.0
"""The configuration of LLaDA (arXiv 2502.09992) for Hugging Face transformers, with the names of
the published config.json.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    """Shape of a LLaDA model. Defaults are those of the published 8B model.

    Args:
        d_model: width of the residual stream.
        n_layers: transformer blocks.
        n_heads: query heads; the head dimension is d_model / n_heads.
        n_kv_heads: key/value heads (grouped-query attention); None: n_heads, or 1 with
            multi_query_attention.
        multi_query_attention: older way to say n_kv_heads; must agree with it where both are given.
        mlp_hidden_size: inner width of the SwiGLU; None: mlp_ratio * d_model.
        mlp_ratio: see mlp_hidden_size.
        vocab_size: rows that stand for tokens.
        embedding_size: rows of the embedding and the head, padding included; None: vocab_size.
        max_sequence_length: longest sequence of the training, in tokens. Longer ones are computed
            all the same.
        rope_theta: base of the rotary embedding (arXiv 2104.09864).
        rms_norm_eps: epsilon of every RMSNorm.
        weight_tying: the head uses the embedding's weight. transformers' name `tie_word_embeddings`
            means the same.
        mask_token_id, eos_token_id, pad_token_id: ids of [MASK], the end of a text, and padding.
        tokenizer_vocab_size: ids of the tokenizer, where it has fewer than there are rows: the rest
            is never generated. None: vocab_size. Not a published field, and written only when set.
        rope, rope_full_precision, alibi, block_type, block_group_size, layer_norm_type,
        layer_norm_with_affine,
            bias_for_layer_norm, attention_layer_norm, input_emb_norm, scale_logits,
            activation_type, include_bias,
            include_qkv_bias, attention_dropout, embedding_dropout, residual_dropout: choices of the
            published code of which
            only LLaDA's is computed here; any other is refused.
        alibi_bias_max, attention_layer_norm_with_affine, flash_attention, init_fn, init_std,
        init_cutoff_factor, init_device,
            precision, use_cache: kept for other readers of the file; they change nothing here. New
            weights are always
            initialised as init_fn "mitchell", and attention is chosen by transformers'
            `attn_implementation`.

    Raises:
        ValueError: a value that this implementation does not compute, or sizes that do not fit
            together.
    """

    model_type = "llada"
    attribute_map = {  # noqa: RUF012  (an annotation would make it a dataclass field in transformers 5)
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
        **kwargs: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in self.published_fields()}
        tied = kwargs.pop("tie_word_embeddings", weight_tying)
        if tied != weight_tying:
            raise ValueError(
                f"LLaDAConfig: weight_tying={weight_tying} contradicts tie_word_embeddings={tied}"
            )
        kwargs.setdefault("architectures", ["LLaDAModelLM"])
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_llada.LLaDAConfig",
                "AutoModel": "modeling_llada.LLaDAModelLM",
                "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            },
        )
        # transformers 4 gives these three a default of its own unless it is told.
        super().__init__(
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=weight_tying,
            **kwargs,
        )
        for name, value in given.items():
            setattr(self, name, value)
        self.tokenizer_vocab_size = tokenizer_vocab_size
        if n_kv_heads is None:
            self.n_kv_heads = 1 if multi_query_attention else n_heads
        if mlp_hidden_size is None:
            self.mlp_hidden_size = mlp_ratio * d_model
        if embedding_size is None:
            self.embedding_size = vocab_size
        self.check()

    @classmethod
    def published_fields(cls) -> list[str]:
        """Names of the fields that every config.json holds."""
        return [
            name
            for name in inspect.signature(cls.__init__).parameters
            if name not in ("self", "tokenizer_vocab_size", "kwargs")
        ]

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: every field, since other readers of the file have other
        defaults.
        """
        fields = {
            **super().to_diff_dict(),
            **{name: getattr(self, name) for name in self.published_fields()},
        }
        if self.tokenizer_vocab_size is None:
            fields.pop("tokenizer_vocab_size", None)
        return fields

    def check(self) -> None:
        """Raise ValueError for what the model in modeling_llada.py does not compute."""
        computed = {
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
        # null means false for the published optional switches
        found = {name: getattr(self, name) or type(only)() for name, only in computed.items()}
        wrong = [
            f"{name}={found[name]!r} (only {only!r})"
            for name, only in computed.items()
            if found[name] != only
        ]
        if wrong:
            raise ValueError(
                f"LLaDAConfig: this implementation does not compute {', '.join(wrong)}"
            )
        if self.d_model % self.n_heads or self.d_model // self.n_heads % 2:
            raise ValueError(
                f"LLaDAConfig: d_model={self.d_model} is not n_heads={self.n_heads} times an even"
                " head dimension"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"LLaDAConfig: n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}"
            )
        if self.multi_query_attention is not None and self.n_kv_heads != (
            1 if self.multi_query_attention else self.n_heads
        ):
            raise ValueError(
                f"LLaDAConfig: n_kv_heads={self.n_kv_heads} contradicts"
                f" multi_query_attention={self.multi_query_attention}"
            )
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"LLaDAConfig: embedding_size={self.embedding_size} is less than"
                f" vocab_size={self.vocab_size}"
            )
        if (
            self.tokenizer_vocab_size is not None
            and not 0 < self.tokenizer_vocab_size <= self.embedding_size
        ):
            raise ValueError(
                f"LLaDAConfig: tokenizer_vocab_size={self.tokenizer_vocab_size} is not from 1 to"
                f" embedding_size={self.embedding_size}"
            )
