"""The default engine: Megatron-Core's model parallelism, pipeline schedules, distributed optimizer
and checkpoints.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llada.config import RunConfig
from llada.config.sections import ModelSection, ParallelSection
from llada.engine import cpu
from llada.engine.base import NO_LIMITS, Limits, ParallelRank, StepResult
from llada.engine.layout import gather_world, join_world, start_model_parallel, stop_model_parallel
from llada.objectives.base import Batch

cpu.before_import()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402

from llada.checkpoint import optimizer_state  # noqa: E402
from llada.checkpoint.background import BackgroundSave, snapshot, write_in_threads  # noqa: E402
from llada.checkpoint.reading import MASTERS, StoredTensors  # noqa: E402
from llada.engine.rank_batch import RankBatch, rank_batch  # noqa: E402
from llada.model import weights  # noqa: E402
from llada.model.attention import attention_inputs, choose_kernel  # noqa: E402
from llada.model.token_losses import KERNELS  # noqa: E402
from llada.model.transformer import BidirectionalTransformer, Predicted  # noqa: E402

cpu.after_import()

Initialise = Callable[[ModelSection, int, dict[str, torch.nn.Parameter], int, int], None]
"""Fills a rank's parameters in place, from the model's shape, the seed, and the tensor rank and
size.
"""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class MegatronEngine:
    """Model, optimizer and their state, spread over the ranks as `config.parallel` says.

    Weights start from the keyed initialisation of (config.seed, canonical name), so every layout
    starts from the same model.

    Args:
        config: the run.
        token_loss: name of the loss kernel, from the objective.
        training: false builds the model alone, for `load_weights` and `logits`: no gradients, no
            optimizer.
        initialise: fills a chunk's parameters; the keyed initialisation of `llada.model.weights`
            unless a benchmark wants less work.
    """

    def __init__(
        self,
        config: RunConfig,
        token_loss: str = "cross_entropy",
        training: bool = True,
        initialise: Initialise = weights.initialise,
    ) -> None:
        self.device = join_world()
        config.check_world(dist.get_world_size())
        self.config = config
        self.place: ParallelRank = start_model_parallel(config.parallel, config.run.hang_timeout)
        self.dtype = DTYPES[config.precision]
        self.kernel = choose_kernel(self.device, self.dtype, config.model.head_dim)
        self.transformer_config = _transformer_config(config, self.dtype, self.device)
        self.chunks = self._build_chunks(KERNELS[token_loss])
        for chunk in self.chunks:
            _mark_sharded(self._parameters(chunk))
            initialise(config.model, config.seed, self._parameters(chunk), *self._tensor_place())
        self.replicas: list[DistributedDataParallel] = []  # none without training
        if not training:
            return
        self.replicas = [self._replicate(chunk) for chunk in self.chunks]
        self.optimizer = _optimizer(config, self.dtype, self.replicas)
        optimizer_state.start_moments(self._optimizers())
        self.transformer_config.finalize_model_grads_func = _finalize
        if config.parallel.overlap_grad_reduce:  # only the last micro-batch's gradients are sent
            contexts = [replica.no_sync for replica in self.replicas]
            self.transformer_config.no_sync_func = contexts if len(contexts) > 1 else contexts[0]
        self.transformer_config.grad_scale_func = None

    # -- training ----------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> RankBatch:
        """Cut out what this rank needs of a micro-batch, in page-locked memory where there is a
        GPU: work for the loader's thread.
        """
        part = rank_batch(
            batch,
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_world_size(),
            self.kernel,
        )
        return part.pin_memory() if self.device.type == "cuda" else part

    def train_step(
        self, batches: Sequence[Batch | RankBatch], learning_rate: float, limits: Limits = NO_LIMITS
    ) -> StepResult:
        """Forward and backward over this replica's micro-batches, then one update, without waiting
        for the device.

        Whether the step is applied is decided on the device: a loss or gradient norm that is not
        finite, or above its limit, leaves weights, moments and step count as they were, on all
        ranks.

        Args:
            batches: this replica's micro-batches, the same number on every replica; those that
                `prepare` made are copied to the GPU while it computes.
            learning_rate: of this step.
            limits: what loss and gradient norm must not exceed.
        """
        for replica in self.replicas:
            replica.zero_grad_buffer()
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self._run(batches, partial(_training_loss, total), forward_only=False)
        self.optimizer.prepare_grads()
        self._sum_over_replicas(total)
        squared = self._squared_norm()
        # A comparison with nan is false. The largest over all ranks: one that disagreed would go on
        # with other weights.
        inside = (
            total.isfinite()
            & squared.isfinite()
            & (total <= limits.loss)
            & (squared <= limits.grad_norm**2)
        )
        left_out = (~inside).float()
        dist.all_reduce(left_out, op=dist.ReduceOp.MAX)
        # AdamW divides the gradients by the first and does nothing where the second is 1.
        scale = ((squared.sqrt() + 1e-6) / self.config.optimizer.clip).clamp(min=1.0).float()
        for part in self._optimizers():
            part.optimizer.grad_scale, part.optimizer.found_inf = scale, left_out
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
            group["weight_decay"] = self.config.optimizer.weight_decay * group["wd_mult"]
        self.optimizer.step_with_ready_grads()
        return StepResult(torch.stack([total, squared, left_out.double()]))

    def _squared_norm(self) -> torch.Tensor:
        """Squared global L2 norm of the gradient, float64 []. Shared and replicated parameters
        count once.
        """
        grads = self.optimizer.get_main_grads_for_grad_norm()
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        squared = torch.stack(torch._foreach_norm(grads)).double().square().sum() if grads else zero
        dist.all_reduce(squared, group=self.optimizer.get_grad_stats_parallel_group())
        return squared

    def _sum_over_replicas(self, total: torch.Tensor) -> None:
        """Sum what the last pipeline stage of every replica and context rank holds; every rank gets
        the result.
        """
        dist.all_reduce(
            total, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch | RankBatch], num_segments: int) -> torch.Tensor:
        """sum(weights * loss) of every segment id over all replicas, float64 [num_segments] on CPU,
        on every rank.
        """
        sums = torch.zeros(num_segments, dtype=torch.float64, device=self.device)
        self._run(batches, partial(_segment_losses, sums), forward_only=True)
        self._sum_over_replicas(sums)
        return sums.cpu()

    def _run(
        self, batches: Sequence[Batch | RankBatch], loss: Callable[..., Any], forward_only: bool
    ) -> None:
        for chunk in self.chunks:
            chunk.train(not forward_only)
        prepared = [
            batch if isinstance(batch, RankBatch) else self.prepare(batch) for batch in batches
        ]
        iterators: list[Iterator[RankBatch]] = [iter(prepared) for _ in self.replicas]
        get_forward_backward_func()(
            forward_step_func=partial(self._forward, loss),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.replicas if len(self.replicas) > 1 else self.replicas[0],
            num_microbatches=len(batches),
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.batch.micro,
            forward_only=forward_only,
        )

    def _forward(
        self, loss: Callable[..., Any], iterator: Iterator[RankBatch], replica: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        """One micro-batch through one chunk, as Megatron-Core's schedules ask for it."""
        batch = next(iterator).to(self.device)
        model = self.config.model
        attention = attention_inputs(
            batch.layout,
            batch.positions,
            batch.first,
            model.head_dim,
            model.rope_theta,
            self.kernel,
            batch.lengths,
        )
        output = replica(batch.inputs, attention, Predicted(batch.indices, batch.targets))
        return output, partial(loss, batch)

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits of every position, fp32 [b, L, vocabulary] on CPU. One process only: for
        verification, not for training.
        """
        model, whole = self.config.model, self.prepare(batch).to(self.device)
        attention = attention_inputs(
            whole.layout,
            whole.positions,
            0,
            model.head_dim,
            model.rope_theta,
            self.kernel,
            whole.lengths,
        )
        self.chunks[0].eval()
        return self.chunks[0](whole.inputs, attention).transpose(0, 1).float().cpu()

    # -- construction ------------------------------------------------------------------------------

    def _build_chunks(
        self, token_loss: Callable[..., torch.Tensor]
    ) -> list[BidirectionalTransformer]:
        virtual = self.config.parallel.virtual_pipeline
        chunks = []
        for stage in range(virtual or 1):
            vp_stage = stage if virtual else None
            chunk = BidirectionalTransformer(
                self.transformer_config,
                self.config.model,
                self.config.data.sequence_length,
                token_loss,
                pre_process=parallel_state.is_pipeline_first_stage(
                    ignore_virtual=virtual is None, vp_stage=vp_stage
                ),
                post_process=parallel_state.is_pipeline_last_stage(
                    ignore_virtual=virtual is None, vp_stage=vp_stage
                ),
                vp_stage=vp_stage,
            )
            chunks.append(chunk.to(self.device))
        return chunks

    def _replicate(self, chunk: BidirectionalTransformer) -> DistributedDataParallel:
        parallel = self.config.parallel
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            bucket_size=parallel.bucket_size,
        )
        return DistributedDataParallel(self.transformer_config, ddp, chunk)

    def _parameters(self, chunk: BidirectionalTransformer) -> dict[str, torch.nn.Parameter]:
        return weights.global_names(
            chunk, get_transformer_layer_offset(self.transformer_config, vp_stage=chunk.vp_stage)
        )

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's parameters by Megatron name, layers numbered over the whole model;
        `.main_grad` holds the gradient.
        """
        self._finish_gather()
        return {
            name: parameter
            for chunk in self.chunks
            for name, parameter in self._parameters(chunk).items()
        }

    @staticmethod
    def _tensor_place() -> tuple[int, int]:
        return (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )

    # -- state -------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write model and optimizer as a Megatron distributed checkpoint into an existing empty
        folder; returns when it is there.
        """
        pending = self.start_save(folder)
        pending.wait()
        if pending.error is not None:
            raise pending.error
        pending.finish()

    def start_save(self, folder: Path) -> BackgroundSave:
        """Start a save into an existing empty folder and return once later steps cannot change what
        it holds; collective.
        """
        write_in_threads()
        self._finish_gather()
        weights_, parts = self._weights(), self._optimizers()
        own = optimizer_state.owned_rectangles(parts, weights_, optimizer_state.EVERYTHING)
        state = snapshot(
            {**weights_, "optimizer": {"step": optimizer_state.step_count(parts), "pieces": own}}
        )
        return BackgroundSave(dist_checkpointing.save(state, str(folder), async_sharded_save=True))

    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Read what `save` wrote, on any layout; without `optimizer` the weights alone, and the
        optimizer starts afresh.

        The fp32 masters of a bf16 run are read in both cases; of a checkpoint without masters the
        weights take their place.
        """
        # first: in fp32 the masters are the weights, and those of a bf16 run have more digits
        self.load_weights(folder)
        parts = self._optimizers()
        kinds: tuple[str, ...] = optimizer_state.EVERYTHING
        if not optimizer:
            kinds = (
                optimizer_state.MASTERS
                if StoredTensors(folder).has_masters
                else optimizer_state.WEIGHTS
            )
        own = optimizer_state.owned_rectangles(parts, self._weights(), kinds)
        views = [piece.data for piece in own]
        state = dist_checkpointing.load({"optimizer": {"pieces": own}}, str(folder))
        for view, value in zip(views, state["optimizer"]["pieces"], strict=True):
            view.copy_(value)
        if optimizer:
            optimizer_state.set_step_count(parts, state["optimizer"]["step"])
        else:
            optimizer_state.start_moments(parts)
        for replica in self.replicas:  # what other replicas own
            replica.start_param_sync(force_sync=True)

    @torch.no_grad()
    def load_canonical(self, source: weights.Weights) -> None:
        """Take the weights from canonical tensors, and start the optimizer afresh; every rank reads
        the rows that it holds.

        The fp32 masters of a bf16 run take every digit that the source has.
        """
        owners = {
            id(parameter): part
            for part in self._optimizers()
            for parameter in part.model_param_group_index_map
        }
        for name, parameter in self.parameters().items():
            whole = torch.empty(parameter.shape, dtype=torch.float32)
            weights.scatter(self.config.model, source, name, whole, *self._tensor_place())
            parameter.copy_(whole)
            if (part := owners.get(id(parameter))) is not None:  # else other replicas own all of it
                span = part._get_model_param_range_map(parameter)["param"]
                master = part._get_main_param_and_optimizer_states(parameter)["param"]
                master.copy_(whole.flatten()[span.start : span.end].view(master.shape))
        optimizer_state.start_moments(self._optimizers())

    def _finish_gather(self) -> None:
        """With overlap_param_gather an update's parameters arrive with the next forward pass;
        whoever reads them before must wait.
        """
        if self.config.parallel.overlap_param_gather:
            for replica in self.replicas:
                replica.start_param_sync(force_sync=True)

    def load_weights(self, folder: Path, masters: bool = False) -> None:
        """Read the model's weights, or with `masters` their fp32 masters, in its own precision,
        without the optimizer: enough for looking, not for training.
        """
        wanted = self._weights()
        for value in nested_values(wanted) if masters else ():
            value.key = MASTERS + value.key
        state = dist_checkpointing.load(wanted, str(folder))
        for index, chunk in enumerate(self.chunks):
            # not strict: Megatron-Core's modules list empty extra states
            chunk.load_state_dict(state[f"model{index}"], strict=False)

    def _optimizers(self) -> list[Any]:
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def _weights(self) -> dict[str, Any]:
        """The sharded state of all chunks; they must be saved and loaded in one call."""
        states = {
            f"model{i}": chunk.sharded_state_dict(metadata=self._sharding())
            for i, chunk in enumerate(self.chunks)
        }
        # Not the extra states that Megatron-Core's modules list: they are empty, and a checkpoint
        # made of weights alone has none.
        return {
            name: {key: v for key, v in state.items() if not isinstance(v, ShardedObject)}
            for name, state in states.items()
        }

    @staticmethod
    def _sharding() -> dict[str, Any]:
        return {
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }

    # -- the rest of the contract ------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag whether it is set on any rank, in one exchange."""
        if self.place.world_size == 1:
            return flags
        counts = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(counts)
        return tuple(count > 0 for count in counts.tolist())

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, on every rank."""
        return gather_world(value)

    def peak_memory_gb(self) -> float:
        """Largest memory use of this rank so far, GB: allocated GPU memory, or the resident set of
        the process on CPU.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def close(self) -> None:
        """Leave the model-parallel groups; the world stays for another engine in this process."""
        stop_model_parallel()


def _mark_sharded(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Tell Megatron-Core which parameters are shards and which are copies on every tensor rank: the
    gradient norm counts copies once. Its own initialisation would have done so, but ours replaces
    it.
    """
    for name, parameter in parameters.items():
        if parameter.dim() > 1:
            by_columns = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            tensor_parallel.set_tensor_model_parallel_attributes(
                parameter, is_parallel=True, dim=int(by_columns), stride=1
            )


def _training_loss(
    total: torch.Tensor, batch: RankBatch, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum of the weighted losses over the step's normaliser. Three values: with two, the schedule
    would still rescale by the context-parallel size and the number of micro-batches.
    """
    loss = (losses * batch.weights).sum() / batch.normaliser
    total += loss.detach()
    return loss, torch.zeros((), dtype=torch.int, device=losses.device), {}


def _segment_losses(
    sums: torch.Tensor, batch: RankBatch, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Add the weighted losses up by segment, in `sums`."""
    segments = batch.segments.to(sums.device, non_blocking=True)
    sums.index_add_(0, segments, (losses * batch.weights).double())
    return losses.sum(), torch.zeros((), dtype=torch.int, device=losses.device), {}


def _finalize(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any
) -> None:
    """Finish the gradients without dividing by a token count: the losses already carry the step's
    normaliser.
    """
    finalize_model_grads(model, None, **kwargs)


def _optimizer(
    config: RunConfig, dtype: torch.dtype, replicas: list[DistributedDataParallel]
) -> Any:
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        replicas,
    )
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts:
        for group in part.optimizer.param_groups:
            group["fused"], group["foreach"] = (
                True,
                False,
            )  # one kernel per tensor instead of one per operation
    return parts[0] if len(parts) == 1 else optimizer


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
"""Megatron-Core's names for parallel.recompute."""


def _stage_layout(parallel: ParallelSection) -> list[list[str]] | None:
    """parallel.layers_per_stage as Megatron-Core wants it: the kinds of layers of every chunk."""
    if parallel.layers_per_stage is None:
        return None
    chunks = [["decoder"] * count for count in parallel.layers_per_stage]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _transformer_config(
    config: RunConfig, dtype: torch.dtype, device: torch.device
) -> TransformerConfig:
    model, parallel = config.model, config.parallel
    gpu = device.type == "cuda"
    overlapped = parallel.virtual_pipeline is not None
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
        # the engine adds up; no division by micro-batches, replicas or tokens
        calculate_per_token_loss=True,
        perform_initialization=False,  # weights come from llada.model.weights
        use_cpu_initialization=not gpu,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        pipeline_model_parallel_layout=_stage_layout(parallel),
        context_parallel_size=parallel.context,
        **_RECOMPUTE[parallel.recompute],
        # Batched p2p with two stages and virtual stages gives silently wrong gradients: never with
        # virtual stages.
        overlap_p2p_comm=overlapped,
        batch_p2p_comm=not overlapped,
        # it works around a fault of torch before 1.13, and waits for the device in every exchange
        batch_p2p_sync=False,
        deterministic_mode=config.run.deterministic and gpu,
        use_te_activation_func=True,  # our SwiGLU
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
