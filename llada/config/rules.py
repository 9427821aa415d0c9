"""Rules across sections: the combinations of settings that no run can have.

One function a rule. Each raises ValueError with a message that starts with the full name of the
setting to change; `RunConfig` calls them in the order in which a user should read them.
"""

from __future__ import annotations

from llada.config.data_sections import DataSection
from llada.config.objective_sections import ObjectiveSection
from llada.config.sections import (
    BatchSection,
    ModelSection,
    ParallelSection,
    ScheduleSection,
    SFTSection,
)

# -- settings of the other task --------------------------------------------------------------------


def refuse_sft_settings(sft: SFTSection) -> None:
    """Pretraining reads no conversations, so nothing in `sft` has an effect."""
    if sft != SFTSection():
        raise ValueError(
            f"sft.pad_group: {sft.pad_group} is for task: sft only; leave it out of a pretraining"
            " config"
        )


def refuse_padding_of_autoregression(objective: ObjectiveSection, sft: SFTSection) -> None:
    """A model that writes from left to right stops at EOS; nothing behind it is ever read."""
    if objective.name == "autoregressive" and sft != SFTSection():
        raise ValueError(
            f"sft.pad_group: {sft.pad_group} has no effect with objective.name: autoregressive,"
            " which does not pad responses; leave it out"
        )


def refuse_random_lengths(data: DataSection) -> None:
    """A conversation is never cut: a reply without its prompt teaches something else."""
    if data.random_length_probability:
        raise ValueError(
            f"data.random_length_probability: {data.random_length_probability} is for pretraining;"
            " conversations are not cut, set 0"
        )


def refuse_document_mask(data: DataSection) -> None:
    """A row of fine-tuning holds one conversation, so there are no documents to separate."""
    if data.document_mask:
        raise ValueError(
            "data.document_mask: true is for pretraining; a row holds one conversation, leave it"
            " out"
        )


def refuse_lengths_in_tokens(data: DataSection, schedule: ScheduleSection) -> None:
    """Conversations have no fixed number of tokens per step, so tokens do not convert to steps."""
    for i, entry in enumerate(data.mixture):
        if entry.weight_at:
            raise ValueError(
                f"data.mixture.{i}.weight_at: changes at token counts are for pretraining;"
                " conversations have no fixed number of tokens per step, leave it out"
            )
    if any(stage.tokens is not None for stage in schedule.stages):
        raise ValueError(
            "schedule.stages: tokens: conversations have no fixed number of tokens per step; give"
            " the lengths as steps"
        )


# -- the model over the ranks ----------------------------------------------------------------------


def check_tensor_parallelism(parallel: ParallelSection, model: ModelSection) -> None:
    """Every dimension that tensor parallelism splits must split evenly.

    Attention is split by heads, the MLP by its inner width, embedding and head by vocabulary rows.
    """
    sizes = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.kv_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.vocab_size": model.vocab_size,
    }
    for setting, size in sizes.items():
        if size % parallel.tensor:
            raise ValueError(
                f"parallel.tensor: {parallel.tensor} does not divide {setting} = {size}"
            )


def check_layers_per_stage(parallel: ParallelSection, model: ModelSection) -> None:
    """Every chunk of the pipeline needs layers, and together they must be the whole model.

    Example: 10 layers over pipeline = 2 x virtual_pipeline = 2 are 4 chunks. Equal shares do not
    exist; layers_per_stage = [3, 3, 2, 2] is one valid split.
    """
    setting = "parallel.pipeline"
    if parallel.virtual_pipeline is not None:
        setting = "parallel.pipeline x parallel.virtual_pipeline"
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)

    shares = parallel.layers_per_stage
    if shares is None:
        if model.num_layers % chunks:
            raise ValueError(
                f"{setting}: {chunks} does not divide model.num_layers = {model.num_layers}; give"
                " the shares as parallel.layers_per_stage"
            )
        return
    if len(shares) != chunks:
        raise ValueError(
            f"parallel.layers_per_stage: {len(shares)} numbers for {setting} = {chunks}"
        )
    if min(shares) < 1 or sum(shares) != model.num_layers:
        raise ValueError(
            f"parallel.layers_per_stage: {shares} must be at least 1 each and add up to"
            f" model.num_layers = {model.num_layers}"
        )


def check_overlap(parallel: ParallelSection) -> None:
    """Megatron-Core gathers parameters in the buckets in which it reduced their gradients."""
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise ValueError(
            "parallel.overlap_param_gather: true needs parallel.overlap_grad_reduce: true; set both"
            " to false to train without overlap"
        )


def check_virtual_pipeline(parallel: ParallelSection) -> None:
    """Chunks interleave between stages; a single stage has nothing to interleave with."""
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        raise ValueError(
            f"parallel.virtual_pipeline: {parallel.virtual_pipeline} needs parallel.pipeline > 1,"
            " which is 1"
        )


def check_sequence_parallelism(parallel: ParallelSection) -> None:
    """Sequence parallelism splits over the tensor-parallel ranks, so there must be several."""
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError("parallel.sequence: true needs parallel.tensor > 1, which is 1")


# -- the batch over the ranks ----------------------------------------------------------------------


def check_sequence_length(data: DataSection, parallel: ParallelSection) -> None:
    """All ranks that share a sequence hold equally many of its tokens."""
    ranks = parallel.context
    if parallel.sequence:
        ranks *= parallel.tensor
    if data.sequence_length % ranks:
        raise ValueError(
            f"data.sequence_length: {data.sequence_length} is not a multiple of parallel.context x"
            f" parallel.tensor = {ranks}"
        )


def check_micro_batches(batch: BatchSection) -> None:
    """A step is a whole number of micro-batches."""
    if batch.global_ % batch.micro:
        raise ValueError(
            f"batch.global: {batch.global_} is not a multiple of batch.micro = {batch.micro}"
        )
