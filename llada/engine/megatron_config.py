"""Our settings as Megatron-Core's configuration objects."""

from __future__ import annotations

from typing import Any

import torch

from llada.config import RunConfig
from llada.config.sections import OptimizerSection, ParallelSection
from llada.engine import cpu

cpu.before_import()

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

# Megatron-Core's settings for each value of parallel.recompute.
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def transformer_config(
    config: RunConfig, dtype: torch.dtype, device: torch.device
) -> TransformerConfig:
    """The configuration of the model and of its parallelism."""
    model = config.model
    parallel = config.parallel
    on_gpu = device.type == "cuda"
    has_virtual_stages = parallel.virtual_pipeline is not None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # The engine only adds: no division by micro-batches, replicas or tokens.
        calculate_per_token_loss=True,
        # Weights come from llada.model.weights.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        pipeline_model_parallel_layout=_stage_layout(parallel),
        context_parallel_size=parallel.context,
        **_RECOMPUTE[parallel.recompute],
        # With two pipeline stages and virtual stages, batched point-to-point communication gives
        # wrong gradients without an error. So it is never used with virtual stages.
        overlap_p2p_comm=has_virtual_stages,
        batch_p2p_comm=not has_virtual_stages,
        # Works around a fault of torch before 1.13, and waits for the device in every exchange.
        batch_p2p_sync=False,
        deterministic_mode=config.run.deterministic and on_gpu,
        # Makes the MLP call our SwiGLU module as its activation.
        use_te_activation_func=True,
        # Fused kernels that would replace our own modules, or that need Apex or Transformer Engine.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _stage_layout(parallel: ParallelSection) -> list[list[str]] | None:
    """parallel.layers_per_stage in Megatron-Core's form: the kinds of layers of every chunk.

    Example: [1, 2] is [["embedding", "decoder"], ["decoder", "decoder", "loss"]].
    """
    if parallel.layers_per_stage is None:
        return None
    chunks = [["decoder"] * count for count in parallel.layers_per_stage]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def ddp_config(parallel: ParallelSection) -> DistributedDataParallelConfig:
    """The configuration of gradient reduction over the replicas."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
    )


def optimizer_config(settings: OptimizerSection, dtype: torch.dtype) -> OptimizerConfig:
    """The configuration of the distributed AdamW."""
    return OptimizerConfig(
        optimizer="adam",
        # The learning rate is set before each step.
        lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
