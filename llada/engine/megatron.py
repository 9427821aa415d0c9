"""The default engine: Megatron-Core's parallelism, pipeline schedules and distributed optimizer.

Its state is a Megatron-Core distributed checkpoint, written in the background.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from llada.config import RunConfig
from llada.config.sections import ModelSection
from llada.engine import cpu
from llada.engine.base import NO_LIMITS, Limits, ParallelRank, StepResult
from llada.engine.layout import gather_world, join_world, start_model_parallel, stop_model_parallel
from llada.objectives import TOKENS, Batch
from llada.objectives.losses import CROSS_ENTROPY, Loss

cpu.before_import()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402

from llada.checkpoint import optimizer_state  # noqa: E402
from llada.checkpoint.background import BackgroundSave, snapshot, write_in_threads  # noqa: E402
from llada.checkpoint.reading import MASTER_PREFIX, StoredTensors  # noqa: E402
from llada.engine.megatron_config import (  # noqa: E402
    ddp_config,
    optimizer_config,
    transformer_config,
)
from llada.engine.rank_batch import RankBatch, rank_batch  # noqa: E402
from llada.model import weights  # noqa: E402
from llada.model.attention import AttentionInputs, attention_inputs, choose_kernel  # noqa: E402
from llada.model.transformer import BidirectionalTransformer  # noqa: E402

cpu.after_import()

T = TypeVar("T")

Initialize = Callable[[ModelSection, int, dict[str, torch.nn.Parameter], int, int], None]
"""Fills a rank's parameters: (shape of the model, seed, parameters, tensor rank, tensor size)."""

LossResult = tuple[torch.Tensor, torch.Tensor, dict[str, object]]
"""What Megatron-Core's schedules take from a loss: (loss, number of tokens, figures)."""

BatchLoss = Callable[[RankBatch, torch.Tensor], LossResult]
"""A micro-batch and the output of the last chunk -> its loss."""

ShardedState = dict[str, dict[str, object]]
"""A chunk's tensors by name, with their place in the whole model; by name of the chunk."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class MegatronEngine:
    """Model, optimizer and their state, spread over the ranks as `config.parallel` says.

    Weights start from the keyed initialization of (config.seed, canonical name), so the model is
    the same in every layout.

    Args:
        config: The run.
        losses: Of a term, by head, from the objective.
        training: False builds only the model, for `load_weights` and `logits`: no gradients, no
            optimizer.
        initialize: Fills a chunk's parameters. Benchmarks replace the keyed initialization by a
            faster one.
    """

    def __init__(
        self,
        config: RunConfig,
        losses: Mapping[str, Loss] = CROSS_ENTROPY,
        training: bool = True,
        initialize: Initialize = weights.initialize,
    ) -> None:
        self.device = join_world()
        config.check_world(dist.get_world_size())
        self.config = config
        self.parallel_rank: ParallelRank = start_model_parallel(
            config.parallel, config.run.hang_timeout
        )
        self.dtype = DTYPES[config.precision]
        self.kernel = choose_kernel(self.device, self.dtype, config.model.head_dim)
        self.transformer_config = transformer_config(config, self.dtype, self.device)
        # Without virtual pipeline stages a rank has one chunk of the model.
        self.chunks = self._build_chunks(_only_loss(losses))
        for chunk in self.chunks:
            parameters = self._parameters(chunk)
            _mark_sharded(parameters)
            initialize(config.model, config.seed, parameters, *self._tensor_rank_and_size())
        self.replicas: list[DistributedDataParallel] = []
        if training:
            self._prepare_training()

    def _prepare_training(self) -> None:
        """Add gradient buffers and the optimizer."""
        config = self.config
        for chunk in self.chunks:
            replica = DistributedDataParallel(
                self.transformer_config, ddp_config(config.parallel), chunk
            )
            self.replicas.append(replica)
        self.optimizer = _build_optimizer(config, self.dtype, self.replicas)
        optimizer_state.start_moments(self._optimizers())
        # Hooks that Megatron-Core's schedules call.
        self.transformer_config.finalize_model_grads_func = _finalize
        if config.parallel.overlap_grad_reduce:
            # Gradients are sent during the backward pass of the last micro-batch only.
            contexts = [replica.no_sync for replica in self.replicas]
            self.transformer_config.no_sync_func = _one_or_all(contexts)
        self.transformer_config.grad_scale_func = None

    # -- training ----------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> RankBatch:
        """Cut out of a micro-batch what this rank needs, in page-locked memory if there is a GPU.

        The loader calls it in its own thread.
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
        """Run forward and backward over this replica's micro-batches, then one optimizer update.

        The host does not wait for the device. Whether the step is applied is decided on the device:
        a loss or gradient norm that is not finite or above its limit leaves weights, moments and
        step count unchanged, on all ranks.

        Args:
            batches: This replica's micro-batches, the same number on every replica. Those from
                `prepare` are copied to the GPU while it computes.
            learning_rate: Learning rate of this step.
            limits: Largest loss and gradient norm with which the step is applied.
        """
        for replica in self.replicas:
            replica.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._run_schedule(batches, partial(_training_loss, loss), forward_only=False)
        self.optimizer.prepare_grads()
        self._sum_over_replicas(loss)
        squared_norm = self._squared_grad_norm()
        # A comparison with NaN is false.
        within_limits = (
            loss.isfinite()
            & squared_norm.isfinite()
            & (loss <= limits.loss)
            & (squared_norm <= limits.grad_norm**2)
        )
        # All ranks must agree: one that skipped a step alone would continue with other weights.
        skip = (~within_limits).float()
        dist.all_reduce(skip, op=dist.ReduceOp.MAX)
        # torch's fused AdamW divides the gradients by grad_scale, and does nothing if found_inf is
        # 1. Clipping is therefore part of the update: norm / clip, and at least 1.
        grad_scale = (squared_norm.sqrt() + 1e-6) / self.config.optimizer.clip
        grad_scale = grad_scale.clamp(min=1.0).float()
        for part in self._optimizers():
            part.optimizer.grad_scale = grad_scale
            part.optimizer.found_inf = skip
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
            group["weight_decay"] = self.config.optimizer.weight_decay * group["wd_mult"]
        self.optimizer.step_with_ready_grads()
        return StepResult(torch.stack([loss, squared_norm, skip.double()]))

    def _squared_grad_norm(self) -> torch.Tensor:
        """Squared global L2 norm of the gradient, float64 [].

        Parameters that several ranks share or replicate count once.
        """
        squared = torch.zeros((), dtype=torch.float64, device=self.device)
        grads = self.optimizer.get_main_grads_for_grad_norm()
        if grads:
            norms = torch.stack(torch._foreach_norm(grads))
            squared = norms.double().square().sum()
        dist.all_reduce(squared, group=self.optimizer.get_grad_stats_parallel_group())
        return squared

    def _sum_over_replicas(self, total: torch.Tensor) -> None:
        """Sum, in place and on every rank, what the last pipeline stages hold.

        There is one value per replica and context rank. The other stages hold 0.
        """
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(total, group=replicas)
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch | RankBatch], num_groups: int) -> torch.Tensor:
        """Sum weights * loss of every noise group over all replicas.

        Returns:
            float64 [num_groups] on CPU, the same on every rank.
        """
        sums = torch.zeros(num_groups, dtype=torch.float64, device=self.device)
        self._run_schedule(batches, partial(_group_losses, sums), forward_only=True)
        self._sum_over_replicas(sums)
        return sums.cpu()

    def _run_schedule(
        self, batches: Sequence[Batch | RankBatch], loss: BatchLoss, forward_only: bool
    ) -> None:
        """Run Megatron-Core's pipeline schedule over the micro-batches."""
        for chunk in self.chunks:
            chunk.train(not forward_only)
        prepared = [
            batch if isinstance(batch, RankBatch) else self.prepare(batch) for batch in batches
        ]
        # Each chunk reads the micro-batches from the beginning.
        iterators: list[Iterator[RankBatch]] = [iter(prepared) for _ in self.replicas]
        get_forward_backward_func()(
            forward_step_func=partial(self._forward, loss, forward_only),
            data_iterator=_one_or_all(iterators),
            model=_one_or_all(self.replicas),
            num_microbatches=len(batches),
            # Of the rows as the model reads them; Megatron-Core divides it among the ranks.
            seq_length=prepared[0].row_length,
            micro_batch_size=self.config.batch.micro,
            forward_only=forward_only,
        )

    def _forward(
        self,
        loss: BatchLoss,
        each_term: bool,
        iterator: Iterator[RankBatch],
        replica: torch.nn.Module,
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossResult]]:
        """Run one micro-batch through one chunk, as Megatron-Core's schedules require.

        Args:
            loss: From the last chunk's output to the loss.
            each_term: The last chunk returns the loss of each term, without gradients.
            iterator: Over the micro-batches.
            replica: The chunk.

        Returns:
            The chunk's output, and the function from the last chunk's output to the loss.
        """
        batch = next(iterator).to(self.device)
        normalizer = None if each_term else batch.normalizer
        terms = batch.terms[TOKENS]
        output = replica(batch.inputs, self._attention_inputs(batch), terms, normalizer)
        return output, partial(loss, batch)

    def _attention_inputs(self, batch: RankBatch) -> AttentionInputs:
        return attention_inputs(
            batch.layout,
            batch.positions,
            batch.first,
            self.config.model.head_dim,
            self.config.model.rope_theta,
            self.kernel,
            batch.lengths,
        )

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits of every position, fp32 [b, L, vocabulary] on CPU.

        For verification, in a world of one process.
        """
        own = self.prepare(batch).to(self.device)
        chunk = self.chunks[0].eval()
        logits = chunk(own.inputs, self._attention_inputs(own))
        return logits.transpose(0, 1).float().cpu()

    # -- construction ------------------------------------------------------------------------------

    def _build_chunks(self, loss: Loss) -> list[BidirectionalTransformer]:
        num_virtual = self.config.parallel.virtual_pipeline
        chunks = []
        for virtual_stage in range(num_virtual or 1):
            vp_stage = None
            if num_virtual:
                vp_stage = virtual_stage
            where = {"ignore_virtual": num_virtual is None, "vp_stage": vp_stage}
            chunk = BidirectionalTransformer(
                self.transformer_config,
                self.config.model,
                self.config.data.sequence_length,
                loss,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                vp_stage=vp_stage,
            )
            chunks.append(chunk.to(self.device))
        return chunks

    def _parameters(self, chunk: BidirectionalTransformer) -> dict[str, torch.nn.Parameter]:
        """A chunk's parameters by Megatron name, layers numbered over the whole model."""
        offset = get_transformer_layer_offset(self.transformer_config, vp_stage=chunk.vp_stage)
        return weights.global_names(chunk, offset)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's parameters by Megatron name, layers numbered over the whole model.

        Their `.main_grad` is the gradient.
        """
        self._finish_gather()
        parameters: dict[str, torch.nn.Parameter] = {}
        for chunk in self.chunks:
            parameters |= self._parameters(chunk)
        return parameters

    @staticmethod
    def _tensor_rank_and_size() -> tuple[int, int]:
        return (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )

    # -- state -------------------------------------------------------------------------------------

    def start_save(self, folder: Path) -> BackgroundSave:
        """Start to write model and optimizer into an existing empty folder; collective.

        Returns as soon as later steps cannot change what is written.
        """
        write_in_threads()
        self._finish_gather()
        model = self._sharded_state()
        parts = self._optimizers()
        own = optimizer_state.owned_rectangles(parts, model, optimizer_state.ALL_STATES)
        optimizer = {"step": optimizer_state.step_count(parts), "pieces": own}
        state = snapshot({**model, "optimizer": optimizer})
        return BackgroundSave(dist_checkpointing.save(state, str(folder), async_sharded_save=True))

    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Read a save of any layout.

        The fp32 masters of a bf16 run are read in any case. If the checkpoint has none, they start
        from its weights.

        Args:
            folder: What `save` wrote.
            optimizer: Read moments and step count, too; else the optimizer starts afresh.
        """
        # Weights come first. In fp32 the masters are the weights, and the masters of a bf16 run
        # have digits that its weights lack: they must overwrite, and not be overwritten.
        self.load_weights(folder)
        parts = self._optimizers()
        kinds: tuple[str, ...] = optimizer_state.ALL_STATES
        if not optimizer:
            has_masters = StoredTensors(folder).has_masters
            kinds = optimizer_state.WEIGHT_STATES
            if has_masters:
                kinds = optimizer_state.MASTER_STATES
        own = optimizer_state.owned_rectangles(parts, self._sharded_state(), kinds)
        views = [rectangle.data for rectangle in own]
        state = dist_checkpointing.load({"optimizer": {"pieces": own}}, str(folder))
        for view, value in zip(views, state["optimizer"]["pieces"], strict=True):
            view.copy_(value)
        if optimizer:
            optimizer_state.set_step_count(parts, state["optimizer"]["step"])
        else:
            optimizer_state.start_moments(parts)
        # Each replica read the masters that it owns; gather the weights that others own.
        for replica in self.replicas:
            replica.start_param_sync(force_sync=True)

    @torch.no_grad()
    def load_canonical(self, source: weights.Weights) -> None:
        """Take the weights from canonical tensors and start the optimizer afresh.

        Every rank reads the rows that it holds. The fp32 masters of a bf16 run keep every digit
        that the source has.
        """
        part_of = {}
        for part in self._optimizers():
            for parameter in part.model_param_group_index_map:
                part_of[id(parameter)] = part
        for name, parameter in self.parameters().items():
            whole = torch.empty(parameter.shape, dtype=torch.float32)
            weights.scatter(self.config.model, source, name, whole, *self._tensor_rank_and_size())
            parameter.copy_(whole)
            # A replica's optimizer owns a flat range of the elements of some parameters.
            owner = part_of.get(id(parameter))
            if owner is not None:
                span = owner._get_model_param_range_map(parameter)["param"]
                master = owner._get_main_param_and_optimizer_states(parameter)["param"]
                master.copy_(whole.flatten()[span.start : span.end].view(master.shape))
        optimizer_state.start_moments(self._optimizers())

    def _finish_gather(self) -> None:
        """Wait for the weights of the last update.

        With overlap_param_gather they arrive during the next forward pass. Whoever reads them
        earlier must wait.
        """
        if self.config.parallel.overlap_param_gather:
            for replica in self.replicas:
                replica.start_param_sync(force_sync=True)

    def load_weights(self, folder: Path, masters: bool = False) -> None:
        """Read the weights of a save without its optimizer: enough to evaluate, not to train.

        Args:
            folder: What `save` wrote.
            masters: Read the fp32 masters of the weights, in the model's own precision.
        """
        sharded = self._sharded_state()
        if masters:
            for value in nested_values(sharded):
                value.key = MASTER_PREFIX + value.key
        state = dist_checkpointing.load(sharded, str(folder))
        for index, chunk in enumerate(self.chunks):
            # Not strict: Megatron-Core's modules list extra states, which are empty and not saved.
            chunk.load_state_dict(state[f"model{index}"], strict=False)

    def _optimizers(self) -> list[DistributedOptimizer]:
        return _chained(self.optimizer)

    def _sharded_state(self) -> ShardedState:
        """The sharded state of all chunks. They must be saved and loaded in one call."""
        metadata = {
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        states: ShardedState = {}
        for index, chunk in enumerate(self.chunks):
            state = chunk.sharded_state_dict(metadata=metadata)
            # Extra states are left out: they are empty, and a checkpoint that was made from weights
            # alone does not have them.
            states[f"model{index}"] = {
                key: value for key, value in state.items() if not isinstance(value, ShardedObject)
            }
        return states

    # -- the rest of the interface -----------------------------------------------------------------

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        # torch's own barrier would use the GPU.
        self.any_of(False)

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is set on any rank, in one collective."""
        if self.parallel_rank.world_size == 1:
            return flags
        counts = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(counts)
        return tuple(count > 0 for count in counts.tolist())

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank; small and picklable."""
        return gather_world(value)

    def peak_memory_gb(self) -> float:
        """Largest memory use of this rank so far, in GB.

        Allocated memory of the GPU, or on CPU the resident set of the process.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        # Linux counts it in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def close(self) -> None:
        """Leave the model-parallel groups; the world stays for another engine in this process."""
        stop_model_parallel()


def _only_loss(losses: Mapping[str, Loss]) -> Loss:
    """The loss of the model's only head."""
    if set(losses) != {TOKENS}:
        raise ValueError(f"losses: {', '.join(losses)}; the model has one head, {TOKENS}")
    return losses[TOKENS]


def _one_or_all(values: list[T]) -> T | list[T]:
    """Megatron-Core takes a list with one value per chunk, or without virtual stages the value."""
    return values[0] if len(values) == 1 else values


def _mark_sharded(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Mark the parameters that are shards and not copies on every tensor rank.

    The gradient norm counts copies once. Megatron-Core's own initialization would set the marks,
    but ours replaces it.
    """
    for name, parameter in parameters.items():
        if parameter.dim() > 1:
            cut_by_columns = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            tensor_parallel.set_tensor_model_parallel_attributes(
                parameter, is_parallel=True, dim=int(cut_by_columns), stride=1
            )


def _training_loss(total: torch.Tensor, batch: RankBatch, loss: torch.Tensor) -> LossResult:
    """The loss of the micro-batch, which is also added to `total`.

    Three values are returned: with two, Megatron-Core's schedules would still rescale by the
    context-parallel size and the number of micro-batches.
    """
    total += loss.detach()
    return loss, _no_tokens(loss), {}


def _group_losses(sums: torch.Tensor, batch: RankBatch, losses: torch.Tensor) -> LossResult:
    """Add the weighted losses of each noise group to `sums`."""
    terms = batch.terms[TOKENS]
    groups = terms.groups.to(sums.device, non_blocking=True)
    sums.index_add_(0, groups, (losses * terms.weights).double())
    return losses.sum(), _no_tokens(losses), {}


def _no_tokens(losses: torch.Tensor) -> torch.Tensor:
    """The number of tokens, by which Megatron-Core would divide; `_finalize` ignores it."""
    return torch.zeros((), dtype=torch.int, device=losses.device)


def _finalize(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **options: object
) -> None:
    """Finish the gradients without dividing by a number of tokens.

    The losses are already divided by the step's normalizer.
    """
    finalize_model_grads(model, None, **options)


def _build_optimizer(
    config: RunConfig, dtype: torch.dtype, replicas: list[DistributedDataParallel]
) -> MegatronOptimizer:
    optimizer = get_megatron_optimizer(optimizer_config(config.optimizer, dtype), replicas)
    parts = _chained(optimizer)
    for part in parts:
        for group in part.optimizer.param_groups:
            # One kernel per tensor instead of one per operation.
            group["fused"] = True
            group["foreach"] = False
    return parts[0] if len(parts) == 1 else optimizer


def _chained(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Megatron-Core may chain several optimizers, one per group of parameters."""
    return getattr(optimizer, "chained_optimizers", [optimizer])
