# Copyright the llada authors. SPDX-License-Identifier: Apache-2.0
"""LLaDA (arXiv 2502.09992) for Hugging Face transformers 4.46 and later, with the names of the
published weights.

A Llama-like transformer without the causal mask: position i of the logits predicts token i, from
the tokens on both sides. Nothing is kept in buffers: the rotary tables are computed in each forward
pass, so loading onto the meta device is safe.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llada import LLaDAConfig
from .generation_llada import LLaDAGenerationMixin

# Newer versions serve several kernels and want to hear which; older ones know one and have no such
# argument.
_FLASH_TAKES_A_NAME = (
    "attn_implementation" in inspect.signature(_flash_attention_forward).parameters
)


class LLaDARMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back, then times the weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (
            wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        ).to(x.dtype)


def rotary_tables(
    positions: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary embedding (arXiv 2104.09864) at integer positions [b, s], fp32 [b,
    s, 1, head_dim / 2].
    """
    frequencies = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    )
    angles = positions[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [b, s, heads, head_dim] in fp32 by the half-rotation convention (Llama, NeoX) and cast
    back.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def key_mask(
    attention_mask: torch.Tensor, batch: int, length: int, dtype: torch.dtype, flash: bool = False
) -> torch.Tensor | None:
    """What attention adds to or keeps of the scores.

    A query with nothing to attend to (a row of padding) would be the softmax of nothing, NaN: it
    attends to every position instead, and nobody reads the result.

    Args:
        attention_mask: [batch, length], 1 for tokens and 0 for padding; or [batch, 1, length,
            length], either boolean (true: attend) or floating (added to the scores).
        batch: rows.
        length: tokens per row.
        dtype: of the queries; that of an additive mask.
        flash: for flash attention, which takes no mask of pairs.

    Returns:
        Boolean [batch, 1, 1, length] or [batch, 1, length, length], or additive of the latter
        shape. For flash attention boolean
        [batch, length], or None where there is no padding: then nothing has to be unpadded.

    Raises:
        ValueError: another shape or kind.
    """
    shape, floating = tuple(attention_mask.shape), attention_mask.is_floating_point()
    if shape == (batch, length):
        # A look at the values would break a compiled graph.
        if floating and not torch.compiler.is_compiling() and (attention_mask < 0).any():
            raise ValueError(
                "attention_mask: a mask of shape [b, s] holds 1 (token) or 0 (padding), but this"
                " one has negative values"
            )
        keep = attention_mask != 0
        keep = keep | ~keep.any(-1, keepdim=True)
        if flash:
            return None if keep.all() else keep
        return keep[:, None, None, :]
    if shape != (batch, 1, length, length):
        raise ValueError(
            f"attention_mask: shape {shape} is neither {(batch, length)} nor"
            f" {(batch, 1, length, length)}"
        )
    if flash:
        raise ValueError(
            f"attention_mask: flash attention takes no mask of pairs, {shape}; load with"
            " attn_implementation='sdpa'"
        )
    if attention_mask.dtype == torch.bool:
        return attention_mask | ~attention_mask.any(-1, keepdim=True)
    if not floating:
        raise ValueError(
            "attention_mask: of shape [b, 1, s, s] it must be boolean or floating, not"
            f" {attention_mask.dtype}"
        )
    # Cast first: the smallest fp32 number, which many callers write for "never", is -inf in bf16.
    bias = attention_mask.to(dtype)
    return bias.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0.0)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    implementation: str,
) -> torch.Tensor:
    """Bidirectional attention.

    Args:
        q: [b, s, heads, head_dim].
        k, v: [b, s, kv_heads, head_dim].
        mask: of `key_mask`, or None.
        implementation: "sdpa", "eager", or a flash attention of transformers.

    Returns:
        [b, s, heads, head_dim]
    """
    if "flash" in implementation:
        named = {"attn_implementation": implementation} if _FLASH_TAKES_A_NAME else {}
        return _flash_attention_forward(q, k, v, mask, q.shape[1], is_causal=False, **named)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if implementation == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False)
    elif implementation == "eager":
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            )
        out = scores.softmax(-1).to(v.dtype) @ v
    else:
        raise ValueError(
            f"attn_implementation: '{implementation}' is not one of sdpa, eager, flash_attention_2"
            " and its successors"
        )
    return out.transpose(1, 2)


def diffusion_loss(
    logits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, p_mask: torch.Tensor
) -> torch.Tensor:
    """Equation 3 of arXiv 2502.09992 where every position is labelled, and equation 5 where the
    prompt is not.

    Per row: the sum over its masked and labelled positions of CE / p_mask, divided by the number of
    labelled positions; the mean over the rows. Cross entropy is taken in fp32. A row without labels
    counts as 0.

    Args:
        logits: [b, s, rows].
        labels: int64 [b, s], the clean ids; -100: not in the loss.
        masked: bool [b, s], where the input was [MASK].
        p_mask: floating [b, s], [b, 1] or [b], the probability with which a position was masked.

    Returns:
        fp32 scalar.

    Raises:
        ValueError: another shape.
    """
    batch, length = masked.shape
    if tuple(labels.shape) != (batch, length):
        raise ValueError(f"labels: shape {tuple(labels.shape)} is not {(batch, length)}")
    p_wide = p_mask[:, None] if p_mask.dim() == 1 else p_mask
    fits = (
        p_wide.dim() == 2
        and p_wide.shape[0] == batch
        and (p_wide.shape[1] == 1 or p_wide.shape[1] == length)
    )
    if not fits or not p_mask.is_floating_point():
        raise ValueError(
            f"p_mask: {p_mask.dtype} of shape {tuple(p_mask.shape)} is not floating of shape"
            f" {(batch, length)}, {(batch, 1)} or {(batch,)}"
        )
    labels, masked, p_wide = (x.to(logits.device) for x in (labels, masked, p_wide))
    nll = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    ).view(batch, length)
    labelled = labels != -100
    counted = labelled & masked
    # Where nothing was masked p may be 0, and 0 / 0 would reach the gradient through `where`.
    weights = counted / torch.where(counted, p_wide.float(), 1.0)
    return ((nll * weights).sum(1) / labelled.sum(1).clamp(min=1)).mean()


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

    def attention(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        kind: str,
    ) -> torch.Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask, kind)
        return self.attn_out(out.flatten(2))

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        kind: str,
    ) -> torch.Tensor:
        """[b, s, d_model] -> the same; tables of `rotary_tables`; mask and kind of attention of
        `attend`.
        """
        x = x + self.attention(self.attn_norm(x), cos, sin, mask, kind)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAEmbedding(nn.Embedding):
    """The embedding, and of a tied model the head too.

    The head is a call of this module, not a look at its weight: hooks that bring offloaded weights
    act on calls.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ids [b, s] -> embeddings [b, s, d_model]; states [b, s, d_model] -> logits [b,
        s, rows].
        """
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


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
                "wte": LLaDAEmbedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(
                    LLaDABlock(config, layer) for layer in range(config.n_layers)
                ),
                "ln_f": LLaDARMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            self.transformer["ff_out"] = _linear(
                config.d_model, config.embedding_size, config.d_model**-0.5
            )

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        keep_states: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """From embeddings [b, s, d_model] to the output of the final norm.

        Args:
            x: embeddings.
            attention_mask, position_ids: see LLaDAModelLM.forward.
            keep_states: also return the input of every block, then the output of the final norm.
                Otherwise each is freed as soon as the next block has read it.
        """
        config, (batch, length), kind = self.config, x.shape[:2], self.config._attn_implementation
        positions = (
            torch.arange(length, device=x.device)[None]
            if position_ids is None
            else position_ids.to(x.device)
        )
        cos, sin = rotary_tables(positions, config.d_model // config.n_heads, config.rope_theta)
        mask = (
            None
            if attention_mask is None
            else key_mask(attention_mask.to(x.device), batch, length, x.dtype, "flash" in kind)
        )
        states: list[torch.Tensor] | None = [] if keep_states else None
        for block in self.transformer["blocks"]:
            if states is not None:
                states.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, cos, sin, mask, kind)
            else:
                x = block(x, cos, sin, mask, kind)
        x = self.transformer["ln_f"](x)
        return x, None if states is None else [*states, x]


class LLaDAModelLM(LLaDAGenerationMixin, PreTrainedModel):
    """The mask predictor: token ids, some of them [MASK], to the logits of every position."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _auto_class = "AutoModelForCausalLM"  # save_pretrained writes this code beside the weights
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn_2 = True  # transformers 4
    _supports_flash_attn = True  # transformers 5
    # The loss is a mean over the rows. Without this transformers' Trainer may take it for a sum
    # over the tokens of all accumulation steps, and not divide by their number.
    accepts_loss_kwargs = False
    # A tied model has no head of its own, so there is no second name for the embedding. This holds
    # for transformers 4, which wants a list of names here, and for 5, which wants a dict.
    _tied_weights_keys = None

    model: Any  # nn.Module's attributes have a type too wide to index

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        # transformers sets keyword arguments of from_pretrained after the config was made
        config.check()
        self.model = LLaDAModel(self.config)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, which fills a missing weight with random numbers and drops one that
        the config has no use for, with no more than a warning. Both mean that config and weights
        are of two models, and here they are an error.

        Raises:
            ValueError: weights that are not those of the config. One of another shape is for
                transformers to refuse, or to let pass with `ignore_mismatched_sizes=True`.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        # Stored scales of quantized weights have no parameters of their own, and transformers reads
        # them apart.
        surplus = [] if getattr(model, "hf_quantizer", None) else report["unexpected_keys"]
        wrong = [("missing", sorted(report["missing_keys"])), ("too many", sorted(surplus))]
        if any(names for _, names in wrong):
            listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong if names)
            raise ValueError(
                f"LLaDAModelLM: the weights in '{pretrained_model_name_or_path}' are not those of"
                f" its config.json: {listed}"
            )
        return (model, report) if wants_report else model

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
        if len(value.weight) != self.config.embedding_size:
            # Whoever adds rows adds tokens; which rows are padding is not known any more.
            self.config.embedding_size, self.config.tokenizer_vocab_size = len(value.weight), None
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> Any:
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.transformer["wte" if self.config.weight_tying else "ff_out"] = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        p_mask: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of every position, and the diffusion loss.

        There is no **kwargs: a name this model does not know is an error, as it is for any
        function.

        Args:
            input_ids: [b, s] integers.
            inputs_embeds: [b, s, d_model], instead of input_ids.
            attention_mask: [b, s], 1 for tokens and 0 for padding on either side; or [b, 1, s, s],
                boolean (true: attend) or floating (added to the scores). None: every token sees
                every token of its row.
            labels: int64 [b, s], the clean ids of which input_ids is the noisy version; -100: not
                in the loss. With p_mask.
            use_cache: ignored; a bidirectional model has nothing to cache.
            output_hidden_states: also return the input of every block and the output of the final
                norm.
            return_dict: false: a tuple.
            position_ids: integers [b, s] or [1, s]; None: 0 to s - 1. Only differences matter, so
                padding needs none.
            p_mask: floating [b, s], [b, 1] or [b], the probability with which a position was
                masked.
            attention_bias, past_key_values, output_attentions, cache_position: of the published
            signature; refused.

        Returns:
            logits [b, s, embedding_size] in the weights' dtype; hidden_states where asked for; with
            labels and p_mask the loss of
            `diffusion_loss`, fp32.

        Raises:
            ValueError: an attention mask or loss argument of another shape; not exactly one of
                input_ids and inputs_embeds; one of labels and p_mask alone; labels with
                inputs_embeds, which do not show where the masks are; an argument that would change
                the result and that this model does not compute.
        """
        others = {
            "attention_bias": attention_bias,
            "past_key_values": past_key_values,
            "cache_position": cache_position,
        }
        refused = [
            name
            for name, value in {**others, "output_attentions": output_attentions or None}.items()
            if value is not None
        ]
        if refused:
            raise ValueError(f"LLaDAModelLM.forward: {', '.join(refused)} not supported")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "LLaDAModelLM.forward: give input_ids or inputs_embeds, exactly one of them"
            )
        if (labels is None) != (p_mask is None):
            raise ValueError(
                "LLaDAModelLM.forward: give labels and p_mask together; the loss weights a token by"
                " 1 / p_mask"
            )
        if labels is not None and (input_ids is None or self.config.mask_token_id is None):
            raise ValueError(
                "LLaDAModelLM.forward: labels need input_ids and the config's mask_token_id, which"
                " show what was masked"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        x, states = self.model(x, attention_mask, position_ids, bool(output_hidden_states))
        logits = self.get_output_embeddings()(x)
        loss = None
        if labels is not None and p_mask is not None:
            loss = diffusion_loss(logits, labels, input_ids == self.config.mask_token_id, p_mask)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=None if states is None else tuple(states)
        )
        return (
            output
            if (self.config.return_dict if return_dict is None else return_dict)
            else output.to_tuple()
        )
