"""LLaDA's transformer from Megatron-Core modules: bidirectional, RMSNorm, RoPE, SwiGLU, grouped
queries, no biases.

The head and the loss are computed only where the objective predicts. The model knows no masks and
no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from llada.config.sections import ModelSection
from llada.model.attention import AttentionInputs, attend, rotate
from llada.model.token_losses import TokenLoss


@dataclass(frozen=True)
class Predicted:
    """The positions whose token the objective predicts, of this rank.

    Attributes:
        indices: into the rows of the flattened [s, b] hidden states, int64 [n], on the device.
        targets: clean tokens, int64 [n].
    """

    indices: torch.Tensor
    targets: torch.Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) in fp32, cast back, times the weight (arXiv 1910.07467)."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # its gradient is summed over the ranks
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class _SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up. Keeps its input alone, and writes both gradients into one tensor without any
    other.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        to_gate, to_up = out.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=to_up).mul_(gradient)
        torch.mul(gradient, up, out=to_gate)
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        return out


class SwiGLU(MegatronModule):
    """[..., 2 f] (gate, up) -> [..., f] (arXiv 2002.05202)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _SwiGLUFunction.apply(x)


class CoreAttention(torch.nn.Module):
    """Rotates queries and keys and attends within segments; Megatron-Core's submodule
    `core_attention`.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        super().__init__()
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: AttentionInputs,
        **_: Any,
    ) -> torch.Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] of this rank -> [s, b, heads *
        d].
        """
        cos, sin = packed_seq_params.cos, packed_seq_params.sin
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        # contiguous split: gathered in rank order, keys and values are the whole row
        if self.context_group.size() > 1:
            key, value = (
                tensor_parallel.gather_from_sequence_parallel_region(x, group=self.context_group)
                for x in (key, value)
            )
        out = attend(query, key, value, packed_seq_params)
        return out.reshape(*out.shape[:2], -1)


def layer_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron-Core's layers with our attention and norms, and no mask of any kind."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.mlp.submodules.activation_func = SwiGLU
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


class BidirectionalTransformer(GPTModel):
    """One chunk (pipeline stage) of the model.

    Args:
        config: Megatron-Core's configuration.
        model: shape of the model.
        token_loss: kernel from logits to losses.
        pre_process: holds the embedding.
        post_process: holds the final norm and the head.
        vp_stage: virtual pipeline stage, None without interleaving.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelSection,
        sequence_length: int,
        token_loss: TokenLoss,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=layer_spec(config, vp_stage),
            vocab_size=model.vocab_size,
            max_sequence_length=sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none",  # rotated in CoreAttention, in fp32
            vp_stage=vp_stage,
        )
        self.token_loss = token_loss
        if post_process:
            # Called as a module, so that hooks run: with overlap_param_gather one of them waits for
            # the head's updated weights.
            self.output_layer.forward = self._head

    def forward(
        self,
        input_ids: torch.Tensor | None,
        attention: AttentionInputs,
        predicted: Predicted | None = None,
    ) -> torch.Tensor:
        """Run this chunk.

        Args:
            input_ids: [b, s] int64 of this context rank; None where there is no embedding.
            attention: layout and rotary tables.
            predicted: positions and targets of the loss; None: return the logits of every position.

        Returns:
            Not the last chunk: hidden states [s / tensor if sequence parallel else s, b, d]. The
            last: losses fp32 [n] in nats,
            or logits [s, b, vocabulary / tensor].
        """
        hidden = (
            self.embedding(input_ids=input_ids, position_ids=None) if self.pre_process else None
        )
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None, packed_seq_params=attention
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # The head's input gradient is a partial sum on every tensor rank: reduce-scatter it in
            # the backward pass.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True
            )
        if predicted is None:
            return self.logits(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self.token_loss(
            self.logits(flat.index_select(0, predicted.indices)), predicted.targets
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head on [..., d]: [..., vocabulary / tensor] of this rank."""
        return self.output_layer(hidden)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The forward pass of the output layer.

        Megatron-Core's functional linear is called with its flags spelled out. The module's own
        forward would add a second all-reduce of the input gradient once sequence parallelism has
        gathered outside of it.
        """
        head = self.output_layer
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else head.weight
        )
        return linear_with_grad_accumulation_and_async_allreduce(
            hidden,
            weight,
            bias=None,
            gradient_accumulation_fusion=head.gradient_accumulation_fusion,
            allreduce_dgrad=head.tp_group.size() > 1 and not self.config.sequence_parallel,
            sequence_parallel=False,
            tp_group=head.tp_group,
        )
