"""The sections of a run's config but `data`: every setting with its unit and default."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llada.config.section import Section


class RunSection(Section):
    """Where the run lives and how it computes."""

    dir: str
    """Run folder: config.yaml, metrics.jsonl, checkpoints/. A run continues from the latest
    committed checkpoint in it.
    """
    threads: int = Field(default=0, ge=0, le=4096)
    """CPU threads of torch per rank; 0: the cores of this process divided by the ranks on the
    machine. Compared on resume; on another layout only if it was set.
    """
    deterministic: bool = False
    """Use deterministic kernels on GPU, so that a restart repeats the run bit for bit. On CPU this
    is always the case.
    """
    hang_timeout: float = Field(default=1800.0, ge=0, le=1e9)
    """Seconds without a finished step, validation or save after which the run reports the silent
    ranks and exits with 75; 0: no limit.
    """
    init_from: str | None = None
    """Run, checkpoint or Hugging Face folder whose weights a new run starts from (not used on
    resume); recorded as lineage.
    """
    init_what: Literal["weights", "weights+optimizer"] = "weights"
    """weights: load only the weights from init_from; weights+optimizer: also the optimizer's
    moments and step count.
    """


class TrainSection(Section):
    """Length of the run, and what it does about bad steps."""

    steps: int = Field(ge=1, le=10**9)
    """Total number of optimizer steps. Nothing else is derived from it, so extending a run never
    changes what came before.
    """
    max_skipped: int = Field(default=3, ge=0)
    """Consecutive steps that may be skipped (loss or gradient not finite, or a spike with
    skip_spikes) before the run stops.
    """
    spike_sigma: float | None = Field(default=6.0, gt=0)
    """Standard deviations (of the logarithm) above the recent level at which a loss or gradient
    norm counts as a spike; a heavier tail raises the limit. null: no spike detection.
    """
    spike_loss_factor: float = Field(default=1.1, ge=1)
    """A loss below this multiple of its recent level is never a spike."""
    spike_norm_factor: float = Field(default=3.0, ge=1)
    """A gradient norm below this multiple of its recent level is never a spike."""
    spike_window: int = Field(default=200, ge=20, le=100_000)
    """Number of applied steps that define the recent level; no step is a spike before there are
    that many.
    """
    skip_spikes: bool = False
    """true: skip spikes; false: only report them, with their samples. Compared on resume; if true,
    so are the four settings above.
    """


class BatchSection(Section):
    """Sizes of a step, in sequences."""

    global_: int = Field(alias="global", ge=1, le=10**7)
    """Sequences per optimizer step, over all ranks and accumulation steps."""
    micro: int = Field(ge=1, le=10**7)
    """Sequences per forward and backward pass of one rank."""


class ModelSection(Section):
    """Shape of the transformer: Llama's, but bidirectional; no biases and no dropout."""

    num_layers: int = Field(ge=1, le=10_000)
    """Transformer layers."""
    hidden_size: int = Field(ge=2, le=10**6)
    """Width of the residual stream (d_model)."""
    num_attention_heads: int = Field(ge=1, le=10**6)
    """Query heads; the head dimension is hidden_size / num_attention_heads."""
    num_query_groups: int | None = Field(default=None, ge=1)
    """Key/value heads (grouped-query attention); null: as many as query heads."""
    ffn_hidden_size: int = Field(ge=1, le=10**7)
    """Inner width of the SwiGLU."""
    vocab_size: int = Field(ge=2, le=10**8)
    """Rows of the embedding and the head. Use the `padded_vocab_size` of the corpora's tokenizer;
    the minimum is its number of ids.
    """
    rope_theta: float = Field(default=500000.0, gt=0)
    """Base of the rotary embedding."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """true: the head uses the embedding's weight."""
    embedding_init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial embedding; null: 1/sqrt(hidden_size), as published. Narrow
    models learn to use context sooner with 1.
    """

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, the default filled in."""
        return self.num_query_groups or self.num_attention_heads

    @model_validator(mode="after")
    def _check_heads(self) -> ModelSection:
        heads = self.num_attention_heads
        groups = self.kv_heads
        if self.hidden_size % heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads ="
                f" {heads}"
            )
        # RoPE rotates pairs of dimensions.
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size: the head dimension {self.head_dim} must be even (rotary embedding)"
            )
        # Every key/value head serves the same number of query heads.
        if heads % groups:
            raise ValueError(
                f"num_query_groups: {groups} does not divide num_attention_heads = {heads}"
            )
        return self


class OptimizerSection(Section):
    """AdamW; weight decay on matrices only (embedding and head included), never on norm weights."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; multiplied by the learning rate."""
    clip: float = Field(default=1.0, gt=0)
    """Maximum global L2 norm of the gradient; a larger gradient is scaled down to it."""


class StageEntry(Section):
    """One stage of the learning-rate schedule.

    `steps` or `tokens` gives its length; a constant last stage may have none and never ends.
    """

    shape: Literal["constant", "linear", "cosine"]
    """constant, linear or cosine: how the learning rate goes from `start` to `end`."""
    start: float | None = Field(default=None, ge=0)
    """Learning rate at the start of the stage; null: that at the end of the previous stage (0 for
    the first).
    """
    end: float | None = Field(default=None, ge=0)
    """Learning rate at the end of the stage; omit it for `constant`."""
    steps: int | None = Field(default=None, ge=1, le=10**9)
    """Length in optimizer steps."""
    tokens: int | None = Field(default=None, ge=1, le=10**18)
    """Length in tokens (rounded up to whole steps of batch.global x data.sequence_length)."""

    @model_validator(mode="after")
    def _check_length_and_rates(self) -> StageEntry:
        # Neither of the two is allowed for a last stage without end; ScheduleSection checks that.
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens: give one length, not both")
        if self.shape == "constant" and self.end is not None and self.end != self.start:
            raise ValueError(
                f"end: {self.end} makes no sense for a constant stage; use shape: linear"
            )
        if self.shape != "constant" and self.end is None:
            raise ValueError(
                f"end: missing, a {self.shape} stage needs the learning rate at its end"
            )
        return self


class RewindEntry(Section):
    """A change of the learning rate by `llada pretrain --rewind STEP lr=RATE`."""

    step: int = Field(ge=0, le=10**9)
    """Number of optimizer steps before the change."""
    lr: float = Field(ge=0)
    """Learning rate of all later steps."""


class ScheduleSection(Section):
    """The learning rate, stage by stage. Lengths are absolute, never shares of the run."""

    stages: list[StageEntry] = Field(min_length=1)
    """The stages in order."""
    rewinds: list[RewindEntry] = Field(default_factory=list)
    """Later changes of the learning rate; the latest one already reached replaces the stages."""

    @model_validator(mode="after")
    def _check_only_the_last_is_endless(self) -> ScheduleSection:
        for i, stage in enumerate(self.stages):
            endless = stage.steps is None and stage.tokens is None
            is_last = i == len(self.stages) - 1
            if endless and not (is_last and stage.shape == "constant"):
                raise ValueError(
                    f"stages[{i}]: give its length as steps or tokens; only a constant last stage"
                    " may have no end"
                )
        return self


class SFTSection(Section):
    """Fine-tuning on conversations; only for `task: sft`."""

    pad_group: int = Field(default=2, ge=1, le=10**6)
    """Consecutive samples whose responses are padded with EOS to the longest row in the group (the
    paper: its local batch of 2).
    """


class ValidationSection(Section):
    """NELBO on the corpora's own validation documents.

    Validation always uses fixed-count masking and the same noise.
    """

    every: int = Field(default=500, ge=1)
    """Optimizer steps between validations; the last step is always validated."""
    windows: int = Field(default=1024, ge=8, le=10**7, multiple_of=4)
    """Windows (conversations in fine-tuning) read per corpus and validation. A quarter of them are
    different, each read at 4 values of t; a corpus with fewer reads all of its own at more values
    of t.
    """


class CheckpointSection(Section):
    """When checkpoints are written, and which are kept."""

    every: int = Field(default=500, ge=1)
    """Optimizer steps between checkpoints; a run also writes one at its end, and on SIGTERM, SIGINT
    or SIGUSR1.
    """
    asynchronous: bool = True
    """Write checkpoints while training continues; only planning the save and the copy to host
    memory block it (metric checkpoint_blocked_seconds).
    """
    keep_last: int | None = Field(default=None, ge=1)
    """Keep the N newest checkpoints; older ones are deleted once a newer one is complete. null: all
    are kept.
    """
    keep_every: int | None = Field(default=None, ge=1)
    """Never delete checkpoints whose step is a multiple of N; null: no exemption."""
    verify: bool = True
    """Compare size and checksum of every file with the commit marker before loading a checkpoint;
    the ranks share the work.
    """


class ParallelSection(Section):
    """How one replica of the model is split over ranks.

    The data-parallel size is the world size divided by the ranks of a replica.
    """

    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel size: ranks over which every matrix is sharded."""
    sequence: bool = False
    """Sequence parallelism: split norms and residuals along the sequence over the tensor-parallel
    ranks.
    """
    pipeline: int = Field(default=1, ge=1)
    """Pipeline-parallel size: number of pipeline stages."""
    virtual_pipeline: int | None = Field(default=None, ge=2)
    """Model chunks per pipeline stage (interleaved schedule); null: one."""
    layers_per_stage: list[int] | None = Field(default=None, min_length=1)
    """Layers of each pipeline stage in order (with virtual_pipeline: of each chunk, in the order of
    the layers); null: equal shares.
    """
    context: int = Field(default=1, ge=1)
    """Context-parallel size: ranks that share a sequence."""
    overlap_grad_reduce: bool = True
    """Reduce gradients between replicas during the backward pass."""
    overlap_param_gather: bool = True
    """Gather updated parameters between replicas during the next forward pass; needs
    overlap_grad_reduce.
    """
    bucket_size: int | None = Field(default=None, ge=1)
    """Number of parameters whose gradients (and updated values) are exchanged together; null: 40
    million, or a million per replica if that is more.
    """
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of keeping it in memory: none, the attention
    (selective), or whole layers (full).
    """

    @property
    def model_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context


class LoggingSection(Section):
    """Where metrics go besides metrics.jsonl, and how often to the console."""

    every: int = Field(default=10, ge=1)
    """Steps between console lines if the output is not a terminal; metrics.jsonl records every
    step.
    """
    tensorboard: bool = False
    """Write TensorBoard event files to RUN/tensorboard."""
    wandb: bool = False
    """Log to Weights & Biases; offline (RUN/wandb) unless you are logged in."""
    wandb_project: str = "llada"
    """Weights & Biases project."""
    profile_steps: int = Field(default=0, ge=0)
    """Steps of rank 0 to trace with torch.profiler, after the first ten of every start; the trace
    goes to RUN/profile. 0: none."""
