# Copyright the llada authors. SPDX-License-Identifier: Apache-2.0
"""LLaDA (arXiv 2502.09992) for Hugging Face transformers 4.46 and later, with the names of the published weights.

A Llama-like transformer without the causal mask: position i of the logits predicts token i, from the tokens on both sides.
Nothing is kept in buffers: the rotary tables are computed in each forward pass, so loading onto the meta device is safe.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llada import LLaDAConfig


class LLaDARMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back, then times the weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary embedding (arXiv 2104.09864) at positions 0 to length - 1, fp32 [length, head_dim / 2]."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [b, heads, s, head_dim] in fp32 by the half-rotation convention (Llama, NeoX) and cast back."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def key_mask(attention_mask: torch.Tensor, batch: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What scaled dot product attention adds to or keeps of the scores.

    A query with nothing to attend to (a row of padding) would be the softmax of nothing, NaN: it attends to every position
    instead, and nobody reads the result.

    Args:
        attention_mask: [batch, length], 1 for tokens and 0 for padding; or [batch, 1, length, length], either boolean (true:
            attend) or floating (added to the scores).
        batch: rows.
        length: tokens per row.
        dtype: of the queries; that of an additive mask.

    Returns:
        Boolean [batch, 1, 1, length] or [batch, 1, length, length], or additive of the latter shape.

    Raises:
        ValueError: another shape or kind.
    """
    shape, floating = tuple(attention_mask.shape), attention_mask.is_floating_point()
    if shape == (batch, length):
        if floating and (attention_mask < 0).any():
            raise ValueError("attention_mask: a mask of shape [b, s] holds 1 (token) or 0 (padding), but this one has negative values")
        keep = (attention_mask != 0)[:, None, None, :]
        return keep | ~keep.any(-1, keepdim=True)
    if shape != (batch, 1, length, length):
        raise ValueError(f"attention_mask: shape {shape} is neither {(batch, length)} nor {(batch, 1, length, length)}")
    if attention_mask.dtype == torch.bool:
        return attention_mask | ~attention_mask.any(-1, keepdim=True)
    if not floating:
        raise ValueError(f"attention_mask: of shape [b, 1, s, s] it must be boolean or floating, not {attention_mask.dtype}")
    # Cast first: the smallest fp32 number, which many callers write for "never", is -inf in bf16.
    bias = attention_mask.to(dtype)
    return bias.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0.0)


def _linear(inputs: int, outputs: int, initial_std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.initial_std = initial_std  # type: ignore[assignment]
    return linear


class LLaDABlock(nn.Module):
    """Pre-norm bidirectional attention and SwiGLU, each with a residual."""

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__()
        d, hidden = config.d_model, config.mlp_hidden_size
        self.head_dim = d // config.n_heads
        kv = config.n_kv_heads * self.head_dim
        std = d**-0.5
        self.attn_norm = LLaDARMSNorm(d, config.rms_norm_eps)
        self.q_proj = _linear(d, d, std)
        self.k_proj = _linear(d, kv, std)
        self.v_proj = _linear(d, kv, std)
        self.attn_out = _linear(d, d, (2 * d * (layer + 1)) ** -0.5)
        self.ff_norm = LLaDARMSNorm(d, config.rms_norm_eps)
        self.ff_proj = _linear(d, hidden, std)
        self.up_proj = _linear(d, hidden, std)
        self.ff_out = _linear(hidden, d, (2 * hidden * (layer + 1)) ** -0.5)

    def attention(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if q.shape[1] != k.shape[1]:
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False)
        return self.attn_out(out.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[b, s, d_model] -> the same; tables of `rotary_tables`; mask of `key_mask`, or None."""
        x = x + self.attention(self.attn_norm(x), cos, sin, mask)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAModel(nn.Module):
    """Embedding, blocks, final norm; it also holds the head, as the published names want."""

    transformer: Any
    _gradient_checkpointing_func: Any  # set by transformers

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config, layer) for layer in range(config.n_layers)),
                "ln_f": LLaDARMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            self.transformer["ff_out"] = _linear(config.d_model, config.embedding_size, config.d_model**-0.5)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
        """From embeddings [b, s, d_model]: the input of every block, then the output of the final norm."""
        config, (batch, length) = self.config, x.shape[:2]
        cos, sin = rotary_tables(length, config.d_model // config.n_heads, config.rope_theta, x.device)
        mask = None if attention_mask is None else key_mask(attention_mask.to(x.device), batch, length, x.dtype)
        states = []
        for block in self.transformer["blocks"]:
            states.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, cos, sin, mask)
            else:
                x = block(x, cos, sin, mask)
        return [*states, self.transformer["ln_f"](x)]


class LLaDAModelLM(PreTrainedModel):
    """The mask predictor: token ids, some of them [MASK], to the logits of every position."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _supports_sdpa = True
    # A tied model has no head of its own, so there is no second name for the embedding. This holds for transformers 4, which
    # wants a list of names here, and for 5, which wants a dict.
    _tied_weights_keys = None

    model: Any  # nn.Module's attributes have a type too wide to index

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        config.check()  # transformers sets keyword arguments of from_pretrained after the config was made
        self.model = LLaDAModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The published "mitchell" initialisation: a normal truncated at 3 standard deviations."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = getattr(module, "initial_std", self.config.d_model**-0.5)
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, LLaDARMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def set_input_embeddings(self, value: Any) -> None:
        self.model.transformer["wte"] = value
        self.config.embedding_size = len(value.weight)

    def get_output_embeddings(self) -> Any:
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.transformer["wte" if self.config.weight_tying else "ff_out"] = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of every position.

        Args:
            input_ids: [b, s] integers.
            attention_mask: [b, s], 1 for tokens and 0 for padding on either side; or [b, 1, s, s], boolean (true: attend) or
                floating (added to the scores). None: every token sees every token of its row.
            inputs_embeds: [b, s, d_model], instead of input_ids.
            output_hidden_states: also return the input of every block and the output of the final norm.
            return_dict: false: a tuple.
            use_cache: ignored; a bidirectional model has nothing to cache.

        Returns:
            logits [b, s, embedding_size] in the weights' dtype, and hidden_states where asked for.

        Raises:
            ValueError: an attention mask of another shape, not exactly one of input_ids and inputs_embeds, or an argument that
                would change the result and that this model does not have (labels, position_ids, past_key_values, ...).
        """
        unknown = ("attention_bias", "labels", "output_attentions", "past_key_values", "position_ids")
        refused = [name for name in unknown if kwargs.get(name) is not None and kwargs[name] is not False]
        if refused:
            raise ValueError(f"LLaDAModelLM.forward: {', '.join(refused)} not supported")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LLaDAModelLM.forward: give input_ids or inputs_embeds, exactly one of them")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        states = self.model(x, attention_mask)
        logits = F.linear(states[-1], self.get_output_embeddings().weight)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = CausalLMOutputWithPast(logits=logits, hidden_states=tuple(states) if output_hidden_states else None)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
