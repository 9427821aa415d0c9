"""RunConfig: every setting of a run, checked on its own and against the others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llada.config import rules
from llada.config.data_sections import DataSection
from llada.config.objective_sections import MaskedSection, ObjectiveSection
from llada.config.section import Section
from llada.config.sections import (
    BatchSection,
    CheckpointSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    ScheduleSection,
    SFTSection,
    TrainSection,
    ValidationSection,
)
from llada.errors import UserError

Task = Literal["pretrain", "sft"]
SHUFFLE_BLOCK = 10_000
"""Samples per block of the data order; a corpus has the same integer quota in every block."""


class RunConfig(Section):
    """All settings of a run. A run is a pure function of them, whatever the layout."""

    task: Task = "pretrain"
    """pretrain or sft; `llada pretrain` rejects a config for sft, and `llada sft` one for pretrain.
    """
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of every random draw: order, t, masks, random lengths, initial weights."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """fp32: the reference. bf16: parameters and activations in bf16; master weights, moments,
    gradient sums, norms, RoPE and loss in fp32.
    """
    engine: Literal["megatron"] = "megatron"
    """Megatron-Core: tensor, pipeline and context parallelism with the distributed optimizer."""
    run: RunSection
    train: TrainSection
    batch: BatchSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = MaskedSection()
    sft: SFTSection = SFTSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()
    logging: LoggingSection = LoggingSection()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, padding included."""
        return self.batch.global_ * self.data.sequence_length

    # Pydantic runs the validators from top to bottom and stops at the first error, so the order
    # decides which of several mistakes a user reads first.

    @model_validator(mode="after")
    def _check_task(self) -> RunConfig:
        if self.task == "pretrain":
            rules.refuse_sft_settings(self.sft)
        else:
            rules.refuse_padding_of_autoregression(self.objective, self.sft)
            rules.refuse_random_lengths(self.data)
            rules.refuse_document_mask(self.data)
            rules.refuse_lengths_in_tokens(self.data, self.schedule)
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> RunConfig:
        rules.check_tensor_parallelism(self.parallel, self.model)
        rules.check_layers_per_stage(self.parallel, self.model)
        rules.check_overlap(self.parallel)
        rules.check_virtual_pipeline(self.parallel)
        rules.check_sequence_parallelism(self.parallel)
        rules.check_sequence_length(self.data, self.parallel)
        rules.check_micro_batches(self.batch)
        return self

    def check_world(self, world_size: int) -> int:
        """Return the data-parallel size of a world of `world_size` ranks.

        Raises:
            UserError: the layout does not fill the world, or the batch does not divide evenly over
                the model's replicas.
        """
        parallel = self.parallel

        # The world is a whole number of replicas; that number is the data-parallel size.
        if world_size % parallel.model_size:
            raise UserError(
                f"parallel: tensor x pipeline x context = {parallel.tensor} x {parallel.pipeline} x"
                f" {parallel.context} = {parallel.model_size} ranks per replica do not divide the"
                f" world size {world_size}"
            )
        data_parallel = world_size // parallel.model_size

        # Every replica runs the same number of micro-batches.
        if self.batch.global_ % (self.batch.micro * data_parallel):
            raise UserError(
                f"batch.global: {self.batch.global_} is not a multiple of batch.micro x"
                f" data-parallel size = {self.batch.micro} x {data_parallel} (world size"
                f" {world_size})"
            )
        micro_batches = self.batch.global_ // (self.batch.micro * data_parallel)

        # Megatron-Core's interleaved schedule runs micro-batches in groups of the pipeline's size.
        if parallel.virtual_pipeline is not None and micro_batches % parallel.pipeline:
            raise UserError(
                f"parallel.virtual_pipeline: {micro_batches} micro-batches per step are not a"
                f" multiple of parallel.pipeline = {parallel.pipeline}"
            )
        return data_parallel
