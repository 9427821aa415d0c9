# Copyright the llada authors. SPDX-License-Identifier: Apache-2.0
"""LLaDA (arXiv 2502.09992) for Hugging Face transformers 4.46 and later.

The model is a Llama-like transformer without the causal mask: the logits at position i predict
token i itself, from the tokens on both sides. Parameter names are those of the published weights.

Shapes in this file: b rows (sequences), s tokens per row, d = d_model.
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

# Newer versions of transformers have several flash attention kernels and must be told which one to
# use; older ones have a single kernel and no such argument.
_FLASH_TAKES_A_NAME = (
    "attn_implementation" in inspect.signature(_flash_attention_forward).parameters
)


class LLaDARMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467), normalized in fp32: x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_fp32 = x.float()
        mean_square = x_fp32.square().mean(-1, keepdim=True)
        normalized = x_fp32 * torch.rsqrt(mean_square + self.eps)
        # Cast back before the weight is applied, as the published code does.
        return self.weight * normalized.to(x.dtype)


def rotary_tables(
    positions: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of the rotary embedding (arXiv 2104.09864).

    They are computed in every forward pass and not kept in buffers: a buffer that is not saved with
    the weights would hold garbage after loading onto the meta device.

    Args:
        positions: Integers [b, s].
        head_dim: Even.
        theta: Base of the frequencies theta^(-2i / head_dim).

    Returns:
        cos and sin, each fp32 [b, s, 1, head_dim / 2].
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (channels / head_dim)
    angles = positions[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to [b, s, heads, head_dim] in fp32, and cast back.

    Channel i is paired with channel i + head_dim / 2 (the half-rotation convention of Llama and
    GPT-NeoX).
    """
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def key_mask(
    attention_mask: torch.Tensor, batch: int, length: int, dtype: torch.dtype, flash: bool = False
) -> torch.Tensor | None:
    """Convert a caller's attention mask to what `attend` takes.

    A query with nothing to attend to (a row of padding) would be the softmax of nothing, NaN.
    Such a query attends to every position instead; its result is never read.

    Args:
        attention_mask: [batch, length], 1 for tokens and 0 for padding; or [batch, 1, length,
            length], either boolean (true: attend) or floating (added to the scores).
        batch: Number of rows.
        length: Tokens per row.
        dtype: Type of the queries. An additive mask is cast to it.
        flash: Prepare the mask for flash attention, which knows padding only.

    Returns:
        Without `flash`: boolean [batch, 1, 1, length] or [batch, 1, length, length], or additive
        [batch, 1, length, length]. With `flash`: boolean [batch, length], or None if there is no
        padding to remove.

    Raises:
        ValueError: A mask of another shape or dtype.
    """
    shape = tuple(attention_mask.shape)
    if shape == (batch, length):
        return _padding_mask(attention_mask, flash)
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
    return _pair_mask(attention_mask, dtype)


def _padding_mask(attention_mask: torch.Tensor, flash: bool) -> torch.Tensor | None:
    """`key_mask` for a mask [b, s] of tokens and padding."""
    # An additive mask passed here by mistake would silently invert the meaning. The values are not
    # checked while compiling: reading them would break the graph.
    if (
        attention_mask.is_floating_point()
        and not torch.compiler.is_compiling()
        and (attention_mask < 0).any()
    ):
        raise ValueError(
            "attention_mask: a mask of shape [b, s] holds 1 (token) or 0 (padding), but this"
            " one has negative values"
        )
    keep = attention_mask != 0
    keep = keep | ~keep.any(-1, keepdim=True)
    if not flash:
        return keep[:, None, None, :]
    return None if keep.all() else keep


def _pair_mask(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`key_mask` for a mask [b, 1, s, s] of query-key pairs."""
    if attention_mask.dtype == torch.bool:
        return attention_mask | ~attention_mask.any(-1, keepdim=True)
    if not attention_mask.is_floating_point():
        raise ValueError(
            "attention_mask: of shape [b, 1, s, s] it must be boolean or floating, not"
            f" {attention_mask.dtype}"
        )
    # Cast first: many callers write the smallest fp32 number for "never", and in bf16 that is -inf.
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
        k: [b, s, kv_heads, head_dim].
        v: The same shape as k.
        mask: The result of `key_mask`, or None.
        implementation: "sdpa", "eager", or the name of a flash attention of transformers.

    Returns:
        [b, s, heads, head_dim].

    Raises:
        ValueError: Another implementation.
    """
    if "flash" in implementation:
        kernel = {"attn_implementation": implementation} if _FLASH_TAKES_A_NAME else {}
        return _flash_attention_forward(q, k, v, mask, q.shape[1], is_causal=False, **kernel)
    # [b, s, heads, head_dim] -> [b, heads, s, head_dim]
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    # Grouped-query attention: each key/value head serves several consecutive query heads.
    queries_per_key = q.shape[1] // k.shape[1]
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(queries_per_key, dim=1)
        v = v.repeat_interleave(queries_per_key, dim=1)
    if implementation == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False)
    elif implementation == "eager":
        out = _eager_attention(q, k, v, mask)
    else:
        raise ValueError(
            f"attn_implementation: '{implementation}' is not one of sdpa, eager, flash_attention_2"
            " and its successors"
        )
    return out.transpose(1, 2)


def _eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v on [b, heads, s, head_dim], softmax in fp32."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def diffusion_loss(
    logits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, p_mask: torch.Tensor
) -> torch.Tensor:
    """The masked diffusion loss of arXiv 2502.09992.

    For each row, cross entropy / p_mask is summed over the positions that are masked and labeled,
    and divided by the number of labeled positions; the loss is the mean over the rows. With every
    position labeled this is equation 3 (pretraining), with the prompt unlabeled equation 5
    (fine-tuning). Cross entropy is computed in fp32. A row without labels contributes 0.

    Args:
        logits: [b, s, embedding_size].
        labels: int64 [b, s], the clean ids; -100 leaves a position out of the loss.
        masked: bool [b, s], where the input was [MASK].
        p_mask: Floating [b, s], [b, 1] or [b], the probability with which a position was masked.

    Returns:
        fp32 scalar.

    Raises:
        ValueError: Labels or p_mask of another shape.
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
    # A model that is spread over several devices returns its logits on the last one.
    labels = labels.to(logits.device)
    masked = masked.to(logits.device)
    p_wide = p_wide.to(logits.device)
    nll = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    ).view(batch, length)
    labeled = labels != -100
    counted = labeled & masked
    # Divide by 1 where the weight is 0: p_mask may be 0 there, and the gradient of 0 / 0 is NaN
    # even where `torch.where` discards the value.
    weights = counted / torch.where(counted, p_wide.float(), 1.0)
    row_losses = (nll * weights).sum(1) / labeled.sum(1).clamp(min=1)
    return row_losses.mean()


def _linear(inputs: int, outputs: int, initial_std: float) -> nn.Linear:
    """A linear layer without bias that knows the standard deviation of its initialization."""
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.initial_std = initial_std  # type: ignore[assignment]
    return linear


class LLaDABlock(nn.Module):
    """A pre-norm transformer block: bidirectional attention and SwiGLU, each with a residual."""

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__()
        d = config.d_model
        hidden = config.mlp_hidden_size
        self.head_dim = d // config.n_heads
        kv = config.n_kv_heads * self.head_dim
        # "mitchell" initialization: layers that write to the residual stream start smaller, the
        # more so the deeper they are.
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
        implementation: str,
    ) -> torch.Tensor:
        """Attention with its projections, [b, s, d] -> [b, s, d]."""
        # [b, s, heads * head_dim] -> [b, s, heads, head_dim]
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask, implementation)
        return self.attn_out(out.flatten(2))

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        implementation: str,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            x: [b, s, d].
            cos: Cosines from `rotary_tables`.
            sin: Sines from `rotary_tables`.
            mask: See `attend`.
            implementation: See `attend`.

        Returns:
            [b, s, d].
        """
        x = x + self.attention(self.attn_norm(x), cos, sin, mask, implementation)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAEmbedding(nn.Embedding):
    """The token embedding. In a model with tied weights it is the head too.

    The head calls this module and does not use its weight directly, because the hooks that bring
    offloaded weights to the device run when a module is called.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ids [b, s] to embeddings [b, s, d], or hidden states [b, s, d] to logits."""
        if x.is_floating_point():
            return F.linear(x, self.weight)
        return super().forward(x)


class LLaDAModel(nn.Module):
    """Embedding, blocks and final norm; and the head, where the published names put it."""

    transformer: Any  # an nn.ModuleDict, whose items have a type too wide to call
    _gradient_checkpointing_func: Any  # set by transformers

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        blocks = nn.ModuleList(LLaDABlock(config, layer) for layer in range(config.n_layers))
        # These keys are part of the published weight names.
        self.transformer = nn.ModuleDict(
            {
                "wte": LLaDAEmbedding(config.embedding_size, config.d_model),
                "blocks": blocks,
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
        """Run the blocks and the final norm on embeddings.

        Args:
            x: Embeddings [b, s, d].
            attention_mask: See LLaDAModelLM.forward.
            position_ids: See LLaDAModelLM.forward.
            keep_states: Also return the input of every block and the output of the final norm.
                Otherwise each state is freed as soon as the next block has read it.

        Returns:
            The output of the final norm [b, s, d], and with `keep_states` the list of states.
        """
        config = self.config
        implementation = config._attn_implementation
        batch, length = x.shape[:2]
        if position_ids is None:
            positions = torch.arange(length, device=x.device)[None]
        else:
            positions = position_ids.to(x.device)
        cos, sin = rotary_tables(positions, config.d_model // config.n_heads, config.rope_theta)
        mask = None
        if attention_mask is not None:
            mask = key_mask(
                attention_mask.to(x.device), batch, length, x.dtype, "flash" in implementation
            )
        states: list[torch.Tensor] = []
        for block in self.transformer["blocks"]:
            if keep_states:
                states.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(
                    block.__call__, x, cos, sin, mask, implementation
                )
            else:
                x = block(x, cos, sin, mask, implementation)
        x = self.transformer["ln_f"](x)
        return x, [*states, x] if keep_states else None


class LLaDAModelLM(LLaDAGenerationMixin, PreTrainedModel):
    """The mask predictor: token ids, some of them [MASK], to the logits of every position."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies this code next to the weights
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn_2 = True  # the name in transformers 4
    _supports_flash_attn = True  # the name in transformers 5
    # The loss is a mean over rows. Without this, transformers' Trainer may take it for a sum over
    # the tokens of all accumulation steps, and then does not divide by the number of steps.
    accepts_loss_kwargs = False
    # A tied model has one parameter under one name, so there are no tied names to list.
    # transformers 4 wants a list here and transformers 5 a dict; both accept None.
    _tied_weights_keys = None

    model: Any  # nn.Module's attributes have a type too wide to index

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        # from_pretrained sets its keyword arguments after the config has checked itself.
        config.check()
        self.model = LLaDAModel(self.config)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a model, and refuse weights that are not those of its config.

        transformers itself fills a missing weight with random numbers and drops an unexpected one,
        both with no more than a warning. Either means that config and weights belong to two
        different models.

        Raises:
            ValueError: Missing or unexpected weights. A weight of another shape is left to
                transformers, which refuses it unless `ignore_mismatched_sizes=True` is given.
        """
        return_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        problems = []
        if report["missing_keys"]:
            problems.append(f"missing: {', '.join(sorted(report['missing_keys']))}")
        # The scales of quantized weights are no parameters; the quantizer reads them separately.
        quantized = getattr(model, "hf_quantizer", None)
        if report["unexpected_keys"] and not quantized:
            problems.append(f"unexpected: {', '.join(sorted(report['unexpected_keys']))}")
        if problems:
            raise ValueError(
                f"LLaDAModelLM: the weights in '{pretrained_model_name_or_path}' are not those of"
                f" its config.json: {'; '.join(problems)}"
            )
        return (model, report) if return_report else model

    def _init_weights(self, module: nn.Module) -> None:
        """The published "mitchell" initialization: a normal truncated at 3 standard deviations."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = getattr(module, "initial_std", self.config.d_model**-0.5)
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, LLaDARMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        if len(value.weight) != self.config.embedding_size:
            # Rows are added for new tokens, so which rows are padding is no longer known.
            self.config.embedding_size = len(value.weight)
            self.config.tokenizer_vocab_size = None
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer[self._head_name()]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.transformer[self._head_name()] = new_embeddings

    def _head_name(self) -> str:
        return "wte" if self.config.weight_tying else "ff_out"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        past_key_values: object = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        p_mask: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Compute the logits of every position, and the diffusion loss.

        There is no **kwargs: a misspelled argument is an error.

        Args:
            input_ids: Integers [b, s].
            inputs_embeds: [b, s, d], instead of input_ids.
            attention_mask: [b, s], 1 for tokens and 0 for padding on either side; or [b, 1, s, s],
                boolean (true: attend) or floating (added to the scores). None: every token attends
                to every token of its row.
            attention_bias: Part of the published signature; refused.
            past_key_values: Part of the published signature; refused.
            labels: int64 [b, s], the clean ids of which input_ids is the noisy version; -100
                leaves a position out of the loss. Requires p_mask.
            use_cache: Ignored. A bidirectional model has nothing to cache.
            output_attentions: Part of the published signature; refused.
            output_hidden_states: Also return the input of every block and the output of the final
                norm.
            return_dict: False returns a tuple.
            cache_position: Part of the published signature; refused.
            position_ids: Integers [b, s] or [1, s]. None means 0 to s - 1. Only differences of
                positions matter, so padded rows need none.
            p_mask: Floating [b, s], [b, 1] or [b], the probability with which a position was
                masked.

        Returns:
            logits [b, s, embedding_size] in the dtype of the weights; hidden_states if requested;
            and with labels and p_mask the loss of `diffusion_loss`, fp32.

        Raises:
            ValueError: An attention mask or loss argument of the wrong shape; not exactly one of
                input_ids and inputs_embeds; only one of labels and p_mask; labels without
                input_ids, which show where the masks are; or an argument that is refused.
        """
        unsupported = {
            "attention_bias": attention_bias,
            "past_key_values": past_key_values,
            "cache_position": cache_position,
            "output_attentions": output_attentions or None,  # False asks for nothing
        }
        refused = [name for name, value in unsupported.items() if value is not None]
        if refused:
            raise ValueError(f"LLaDAModelLM.forward: {', '.join(refused)} not supported")
        self._check_inputs(input_ids, inputs_embeds, labels, p_mask)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        x, states = self.model(x, attention_mask, position_ids, bool(output_hidden_states))
        logits = self.get_output_embeddings()(x)
        if not self.config.predicts_mask_token:
            # Not -inf: guidance subtracts logits from each other.
            lowest = torch.finfo(logits.dtype).min
            mask_id = torch.full((1,), self.config.mask_token_id, device=logits.device)
            logits = logits.index_fill(-1, mask_id, lowest)
        loss = None
        if labels is not None and p_mask is not None:
            loss = diffusion_loss(logits, labels, input_ids == self.config.mask_token_id, p_mask)
        hidden_states = None if states is None else tuple(states)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden_states)
        return output if return_dict else output.to_tuple()

    def _check_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        labels: torch.Tensor | None,
        p_mask: torch.Tensor | None,
    ) -> None:
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
