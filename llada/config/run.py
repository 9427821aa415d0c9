"""RunConfig: every setting of a run, and the combinations that no run can have."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llada.config.sections import (
    BatchSection,
    CheckpointSection,
    DataSection,
    LoggingSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    ScheduleSection,
    Section,
    SFTSection,
    TrainSection,
    ValidationSection,
)
from llada.errors import UserError

Task = Literal["pretrain", "sft"]
SHUFFLE_BLOCK = 10_000
"""Samples per block of the data order; a corpus has the same integer quota in every block."""


class RunConfig(Section):
    """A run: a pure function of this, whatever the layout."""

    task: Task = "pretrain"
    """Which kind of training this is; `llada pretrain` refuses another one's config."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of every random draw: order, t, masks, random lengths, initial weights."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """fp32: the reference. bf16: parameters and activations bf16; master weights, moments, gradient
    sums, norms, RoPE and loss fp32.
    """
    engine: Literal["megatron"] = "megatron"
    """Megatron-Core: tensor, pipeline and context parallelism with the distributed optimizer."""
    run: RunSection
    train: TrainSection
    batch: BatchSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    sft: SFTSection = SFTSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()
    logging: LoggingSection = LoggingSection()

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_ * self.data.sequence_length

    @model_validator(mode="after")
    def _task(self) -> RunConfig:
        if self.task == "pretrain":
            if self.sft != SFTSection():
                raise ValueError(
                    f"sft.pad_group: {self.sft.pad_group} is for task: sft only; leave it out of a"
                    " pretraining config"
                )
            return self
        if self.data.random_length_probability:
            raise ValueError(
                f"data.random_length_probability: {self.data.random_length_probability} is for"
                " pretraining; conversations are not cut, set 0"
            )
        if self.data.document_mask:
            raise ValueError(
                "data.document_mask: true is for pretraining; a row holds one conversation, leave"
                " it out"
            )
        for i, entry in enumerate(self.data.mixture):
            if entry.weight_at:
                raise ValueError(
                    f"data.mixture.{i}.weight_at: changes at token counts are for pretraining;"
                    " conversations have no fixed number of tokens a step, leave it out"
                )
        if any(stage.tokens is not None for stage in self.schedule.stages):
            raise ValueError(
                "schedule.stages: tokens: conversations have no fixed number of tokens a step; give"
                " the lengths as steps"
            )
        return self

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        p, m = self.parallel, self.model
        for what, value in (
            ("model.num_attention_heads", m.num_attention_heads),
            ("model.num_query_groups", m.kv_heads),
            ("model.ffn_hidden_size", m.ffn_hidden_size),
            ("model.vocab_size", m.vocab_size),
        ):
            if value % p.tensor:
                raise ValueError(f"parallel.tensor: {p.tensor} does not divide {what} = {value}")
        chunks = p.pipeline * (p.virtual_pipeline or 1)
        name = (
            "parallel.pipeline"
            if p.virtual_pipeline is None
            else "parallel.pipeline x parallel.virtual_pipeline"
        )
        if p.layers_per_stage is None and m.num_layers % chunks:
            raise ValueError(
                f"{name}: {chunks} does not divide model.num_layers = {m.num_layers}; give the"
                " shares as parallel.layers_per_stage"
            )
        if p.layers_per_stage is not None:
            if len(p.layers_per_stage) != chunks:
                raise ValueError(
                    f"parallel.layers_per_stage: {len(p.layers_per_stage)} numbers for {name} ="
                    f" {chunks}"
                )
            if min(p.layers_per_stage) < 1 or sum(p.layers_per_stage) != m.num_layers:
                raise ValueError(
                    f"parallel.layers_per_stage: {p.layers_per_stage} must be at least 1 each "
                    f"and add up to model.num_layers = {m.num_layers}"
                )
        if p.overlap_param_gather and not p.overlap_grad_reduce:
            raise ValueError(
                "parallel.overlap_param_gather: true needs parallel.overlap_grad_reduce: true; set"
                " both to false to do without overlap"
            )
        if p.virtual_pipeline is not None and p.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline: {p.virtual_pipeline} needs parallel.pipeline > 1,"
                " which is 1"
            )
        if p.sequence and p.tensor == 1:
            raise ValueError("parallel.sequence: true needs parallel.tensor > 1, which is 1")
        split = p.context * (p.tensor if p.sequence else 1)
        if self.data.sequence_length % split:
            raise ValueError(
                f"data.sequence_length: {self.data.sequence_length} is not a multiple of"
                f" parallel.context x parallel.tensor = {split}"
            )
        if self.batch.global_ % self.batch.micro:
            raise ValueError(
                f"batch.global: {self.batch.global_} is not a multiple of batch.micro ="
                f" {self.batch.micro}"
            )
        return self

    def check_world(self, world_size: int) -> int:
        """Return the data-parallel size for `world_size` ranks.

        Raises UserError when the layout does not fill the world or the batch does not divide over
        its replicas.
        """
        p = self.parallel
        if world_size % p.model_size:
            raise UserError(
                f"parallel: tensor x pipeline x context = {p.tensor} x {p.pipeline} x {p.context} ="
                f" {p.model_size} ranks per replica do not divide the world size {world_size}"
            )
        data = world_size // p.model_size
        if self.batch.global_ % (self.batch.micro * data):
            raise UserError(
                f"batch.global: {self.batch.global_} is not a multiple of batch.micro x"
                f" data-parallel size = {self.batch.micro} x {data} (world size {world_size})"
            )
        micro_batches = self.batch.global_ // (self.batch.micro * data)
        if p.virtual_pipeline is not None and micro_batches % p.pipeline:
            raise UserError(
                f"parallel.virtual_pipeline: {micro_batches} micro-batches per step are not a"
                f" multiple of parallel.pipeline = {p.pipeline}"
            )
        return data
