"""LLaDA's transformer, built from Megatron-Core modules.

Bidirectional attention, RMSNorm, RoPE, SwiGLU, grouped queries, no biases. The head and the loss
are computed only at the positions that the objective predicts. The model knows neither masks nor
the noise schedule.

Shapes in this file: s tokens of this context rank, b rows, d hidden size. With sequence parallelism
the hidden states between the layers have s / tensor ranks tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
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
from llada.model.head_loss import CHUNK_ELEMENTS, Head
from llada.model.vocabulary import ShardedVocabulary, WholeVocabulary
from llada.objectives.losses import HeadTerms, Loss

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


class RMSNorm(torch.nn.Module):
    """RMSNorm (arXiv 1910.07467): x / rms(x) in fp32, cast back, times the weight."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__()
        weight = torch.ones(
            hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight = torch.nn.Parameter(weight)
        # With sequence parallelism each tensor rank normalizes other tokens. Megatron-Core sums the
        # gradients of parameters that carry this mark over the tensor ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class _SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up with little memory.

    Only the input is kept for the backward pass, and both gradients are written into one tensor
    without temporaries.
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
        # d/d up = silu(gate) * gradient
        torch.ops.aten.silu.out(gate, out=to_up).mul_(gradient)
        # d/d gate = silu'(gate) * (gradient * up)
        torch.mul(gradient, up, out=to_gate)
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        return out


class SwiGLU(MegatronModule):
    """SwiGLU (arXiv 2002.05202): [..., 2 f], gate and up side by side, -> [..., f]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _SwiGLUFunction.apply(x)


class CoreAttention(torch.nn.Module):
    """Rotary embedding and attention within segments: Megatron-Core's `core_attention`."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, **_: object
    ) -> None:
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
        **_: object,
    ) -> torch.Tensor:
        """Attend, with the arguments that Megatron-Core's attention layer passes.

        Args:
            query: This rank's tokens, [s, b, heads, head_dim].
            key: This rank's tokens, [s, b, groups, head_dim].
            value: This rank's tokens, [s, b, groups, head_dim].
            attention_mask: Always None.
            packed_seq_params: Where Megatron-Core carries the layout and the rotary tables.

        Returns:
            [s, b, heads * head_dim].
        """
        inputs = packed_seq_params
        query = rotate(query, inputs.cos, inputs.sin)
        key = rotate(key, inputs.cos, inputs.sin)
        if self.context_group.size() > 1:
            # Each context rank has a contiguous part of the row, so keys and values gathered in
            # rank order are the whole row.
            key = _gather_rows(key, self.context_group)
            value = _gather_rows(value, self.context_group)
        out = attend(query, key, value, inputs)
        return out.reshape(*out.shape[:2], -1)


def _gather_rows(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """[s, ...] of each rank -> [s ranks, ...]; the backward pass reduce-scatters the gradient."""
    return tensor_parallel.gather_from_sequence_parallel_region(x, group=group)


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
        model: Shape of the model.
        sequence_length: Tokens per row, over all context ranks.
        loss: Of a term.
        pre_process: Whether the chunk has the embedding.
        post_process: Whether the chunk has the final norm and the head.
        vp_stage: Virtual pipeline stage; None without interleaving.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelSection,
        sequence_length: int,
        loss: Loss,
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
        self.loss = loss
        if post_process:
            # Replace the forward method and keep calling the module, so that its hooks run: with
            # overlap_param_gather one of them waits for the head's updated weights.
            self.output_layer.forward = self._head

    def forward(
        self,
        input_ids: torch.Tensor | None,
        attention: AttentionInputs,
        terms: HeadTerms | None = None,
        normalizer: float | None = None,
    ) -> torch.Tensor:
        """Run this chunk.

        Args:
            input_ids: int64 [b, s] of this context rank. Ignored without an embedding.
            attention: Layout and rotary tables.
            terms: Of the loss; None: return the logits of every position.
            normalizer: Divides the sum of the weighted losses; None: return the loss of each term.

        Returns:
            From the last chunk the loss of the micro-batch, fp32 []; or the losses of its terms,
            fp32 [n], in nats and without gradients; or the logits [s, b, vocabulary / tensor
            ranks]. From any other the hidden states, [s, b, d], or with sequence parallelism [s /
            tensor ranks, b, d].
        """
        # Without an embedding the decoder reads the hidden states that Megatron-Core's schedule
        # received from the stage before and set as its input.
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=input_ids, position_ids=None)
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None, packed_seq_params=attention
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # Every tensor rank has a part of the tokens and needs all of them for its part of the
            # vocabulary. The gradient of the head's input is a partial sum on each rank, so the
            # backward pass must reduce-scatter it.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True
            )
        if terms is None:
            return self.logits(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self.output_layer(flat.index_select(0, terms.indices), terms, normalizer)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the head: [..., d] -> [..., vocabulary / tensor ranks]."""
        return self.output_layer(hidden)

    def _head(
        self,
        hidden: torch.Tensor,
        terms: HeadTerms | None = None,
        normalizer: float | None = None,
    ) -> torch.Tensor:
        """The forward pass of the output layer; the arguments are those of `forward`."""
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        if terms is None:
            return self._logits(hidden, weight)
        head = self._loss_head(weight)
        if normalizer is None:
            return head.losses(hidden, weight, terms)
        return head.weighted_loss(hidden, weight, terms, normalizer)

    def _logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Megatron-Core's functional linear with explicit flags.

        The module's own forward would all-reduce the input gradient a second time, because with
        sequence parallelism the hidden states are gathered outside of it.
        """
        layer = self.output_layer
        return linear_with_grad_accumulation_and_async_allreduce(
            hidden,
            weight,
            bias=None,
            gradient_accumulation_fusion=layer.gradient_accumulation_fusion,
            allreduce_dgrad=layer.tp_group.size() > 1 and not self.config.sequence_parallel,
            sequence_parallel=False,
            tp_group=layer.tp_group,
        )

    def _loss_head(self, weight: torch.Tensor) -> Head:
        """How this rank computes the loss of its part of the vocabulary."""
        group = self.output_layer.tp_group
        vocabulary: WholeVocabulary | ShardedVocabulary = WholeVocabulary()
        if group.size() > 1:
            columns = len(weight)
            vocabulary = ShardedVocabulary(group, group.rank() * columns, columns)
        return Head(
            loss=self.loss,
            vocabulary=vocabulary,
            reduces_gradient=group.size() > 1 and not self.config.sequence_parallel,
            chunk_elements=CHUNK_ELEMENTS[weight.device.type],
        )
