"""The sections of a run's config: every setting with its unit and default."""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values are not coerced between kinds."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, strict=True
    )


class RunSection(Section):
    """Where the run lives and how it computes."""

    dir: str
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/. A run that finds a committed
    checkpoint here continues from it.
    """
    threads: int = Field(default=0, ge=0, le=4096)
    """CPU threads of torch per rank; 0: the cores of this process divided by the ranks on the
    machine. Compared at resume, on another layout only where it was set.
    """
    deterministic: bool = False
    """On GPU, use deterministic kernels, so that a restart repeats the run bit for bit. On CPU it
    always does.
    """
    hang_timeout: float = Field(default=1800.0, ge=0, le=1e9)
    """Seconds without a finished step, validation or save after which silent ranks are named and
    the run exits with 75; 0: never.
    """
    init_from: str | None = None
    """Run, checkpoint or Hugging Face folder to take weights from when the run starts (not when it
    resumes); recorded as lineage.
    """
    init_what: Literal["weights", "weights+optimizer"] = "weights"
    """What to take from init_from: the weights alone, or the optimizer's moments and step count
    too.
    """


class TrainSection(Section):
    """How long."""

    steps: int = Field(ge=1, le=10**9)
    """Optimizer steps in all. Nothing else derives from it: extending a run never changes what came
    before.
    """
    max_skipped: int = Field(default=3, ge=0)
    """Steps in a row that may update nothing (loss or gradient not finite, or a spike with
    skip_spikes) before the run stops.
    """
    spike_sigma: float | None = Field(default=6.0, gt=0)
    """Deviations of the logarithm above the recent level from which loss or gradient norm is a
    spike; heavy tails count; null: no rule.
    """
    spike_loss_factor: float = Field(default=1.1, ge=1)
    """Factor over its recent level below which no loss is a spike."""
    spike_norm_factor: float = Field(default=3.0, ge=1)
    """Factor over its recent level below which no gradient norm is a spike."""
    spike_window: int = Field(default=200, ge=20, le=100_000)
    """Applied steps that the rule looks back on; before there are so many, nothing is a spike."""
    skip_spikes: bool = False
    """true: a spike updates nothing; false: it is only named, with its samples. Compared at resume;
    if true, the four above too.
    """


class BatchSection(Section):
    """Sizes of a step, in sequences."""

    global_: int = Field(alias="global", ge=1, le=10**7)
    """Sequences per optimizer step, over all ranks and accumulation steps."""
    micro: int = Field(ge=1, le=10**7)
    """Sequences per forward and backward pass of one rank."""


class WeightChange(Section):
    """Another weight for a corpus from some point of the run on."""

    tokens: int = Field(ge=1, le=10**18)
    """Tokens of the run after which the weight changes, rounded up to whole blocks of 10,000 x
    data.sequence_length; ascending.
    """
    weight: float = Field(ge=0)
    """Weight from there on, relative to the others' (no unit); 0: not read."""


class CorpusEntry(Section):
    """One corpus of the mixture."""

    path: str
    """Folder made by `llada data prepare`."""
    weight: float = Field(default=1.0, ge=0)
    """Share of the samples, relative to the other weights (no unit); 0: not read before a change of
    weight_at.
    """
    max_epochs: float | None = Field(default=None, gt=0)
    """Passes over the corpus after which it leaves the mixture and its share goes to the others by
    weight; null: no cap.
    """
    weight_at: list[WeightChange] = []
    """Changes of the weight at token counts (annealing); pretraining only."""

    @model_validator(mode="after")
    def _ever_read(self) -> CorpusEntry:
        counts = [change.tokens for change in self.weight_at]
        for before, after in itertools.pairwise(counts):
            if after <= before:
                raise ValueError(
                    f"weight_at: tokens {after} after {before}; give the changes in ascending order"
                    " of tokens"
                )
        if not any((self.weight, *(change.weight for change in self.weight_at))):
            raise ValueError(
                f"weight: {self.weight} and never more, so it would not be read; raise it, add"
                " weight_at or drop the entry"
            )
        return self

    def weight_after(self, tokens: int) -> float:
        """The weight after so many tokens of the run."""
        return next(
            (change.weight for change in reversed(self.weight_at) if change.tokens <= tokens),
            self.weight,
        )


class DataSection(Section):
    """What is read."""

    sequence_length: int = Field(ge=8, le=2**24)
    """Tokens per sequence (window)."""
    mixture: list[CorpusEntry] = Field(min_length=1)
    """The corpora. All must have been prepared with the same tokenizer."""
    document_mask: bool = False
    """true: documents of a window do not attend to each other and each has its own t. The paper's
    model was trained without.
    """
    random_length_probability: float = Field(default=0.01, ge=0, le=1)
    """Share of the windows that are cut at a uniform random length into two attention segments (the
    paper: 0.01).
    """
    verify_bytes: int = Field(default=2_000_000_000, ge=0)
    """A corpus of at most this many bytes is verified as a whole when the run starts; for larger
    ones use `llada data verify`.
    """

    @model_validator(mode="after")
    def _never_all_zero(self) -> DataSection:
        for tokens in sorted(
            {0, *(change.tokens for entry in self.mixture for change in entry.weight_at)}
        ):
            if not any(entry.weight_after(tokens) for entry in self.mixture):
                when = f"from {tokens} tokens on" if tokens else "at the start"
                raise ValueError(
                    f"mixture: the weights of all corpora are 0 {when}; give one of them a weight"
                )
        return self


class ModelSection(Section):
    """Shape of the transformer: Llama-like, bidirectional, no biases, RMSNorm, RoPE, SwiGLU,
    dropout 0.
    """

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
    """Rows of the embedding and the head (padding rows included); at least the rows of the
    corpora's tokenizer.
    """
    rope_theta: float = Field(default=500000.0, gt=0)
    """Base of the rotary embedding."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """true: the head uses the embedding's weight."""
    embedding_init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial embedding; null: 1/sqrt(hidden_size), as published. Narrow
    models learn context sooner with 1.
    """

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @model_validator(mode="after")
    def _divides(self) -> ModelSection:
        heads, groups = self.num_attention_heads, self.kv_heads
        if self.hidden_size % heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads ="
                f" {heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size: the head dimension {self.head_dim} must be even (rotary embedding)"
            )
        if heads % groups:
            raise ValueError(
                f"num_query_groups: {groups} does not divide num_attention_heads = {heads}"
            )
        return self


class ObjectiveSection(Section):
    """The training objective."""

    name: Literal["masked"] = "masked"
    """masked: LLaDA's masked diffusion (arXiv 2502.09992, Eq. 3)."""
    timesteps: Literal["stratified", "iid"] = "stratified"
    """How t is drawn for the segments of a step: stratified over the whole global step, or
    independently.
    """
    masking: Literal["bernoulli", "fixed_count"] = "bernoulli"
    """bernoulli: each token masked with p = (1 - eps) t + eps, weight 1/p. fixed_count: n = 1 +
    floor(t L) of the L tokens, weight L/n.
    """
    eps: float = Field(default=1e-3, gt=0, lt=1)
    """Smallest masking probability of bernoulli (the paper: 1e-3)."""


class OptimizerSection(Section):
    """AdamW; weight decay on matrices only (embedding and head included), never on norm weights."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, times the learning rate."""
    clip: float = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient; larger ones are scaled down to it."""


class StageEntry(Section):
    """One piece of the learning-rate schedule. `steps` or `tokens` gives its length; a constant
    last piece may have none: no end.
    """

    shape: Literal["constant", "linear", "cosine"]
    """Form of the piece, from `start` to `end`."""
    start: float | None = Field(default=None, ge=0)
    """Learning rate at the piece's start; null: where the piece before ended (0 for the first)."""
    end: float | None = Field(default=None, ge=0)
    """Learning rate at the piece's end; for `constant` leave it out."""
    steps: int | None = Field(default=None, ge=1, le=10**9)
    """Length in optimizer steps."""
    tokens: int | None = Field(default=None, ge=1, le=10**18)
    """Length in tokens (rounded up to whole steps of batch.global x data.sequence_length)."""

    @model_validator(mode="after")
    def _complete(self) -> StageEntry:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens: give one length, not both")
        if self.shape == "constant" and self.end is not None and self.end != self.start:
            raise ValueError(
                f"end: {self.end} makes no sense for a constant piece; use shape: linear"
            )
        if self.shape != "constant" and self.end is None:
            raise ValueError(
                f"end: missing, a {self.shape} piece needs the learning rate it ends at"
            )
        return self


class RewindEntry(Section):
    """A change of the learning rate by `llada pretrain --rewind STEP lr=RATE`."""

    step: int = Field(ge=0, le=10**9)
    """Optimizer steps done before it."""
    lr: float = Field(ge=0)
    """Learning rate of all steps after it."""


class ScheduleSection(Section):
    """The learning rate, piece by piece, in absolute lengths."""

    stages: list[StageEntry] = Field(min_length=1)
    """The pieces in order."""
    rewinds: list[RewindEntry] = []
    """Later changes of the learning rate; the last one whose step is past counts instead of the
    stages.
    """

    @model_validator(mode="after")
    def _open_end(self) -> ScheduleSection:
        for i, stage in enumerate(self.stages):
            endless = stage.steps is None and stage.tokens is None
            if endless and (i < len(self.stages) - 1 or stage.shape != "constant"):
                raise ValueError(
                    f"stages[{i}]: give its length as steps or tokens; only a constant last stage"
                    " may go on without end"
                )
        return self


class SFTSection(Section):
    """Fine-tuning on conversations; for `task: sft` alone."""

    pad_group: int = Field(default=2, ge=1, le=10**6)
    """Consecutive samples whose responses are padded with EOS to the longest row among them (the
    paper: its local batch of 2).
    """


class ValidationSection(Section):
    """NELBO on the corpora's own validation documents, always with fixed-count masking and the same
    noise each time.
    """

    every: int = Field(default=500, ge=1)
    """Optimizer steps between validations; one more at the end of the run."""
    windows: int = Field(default=1024, ge=8, le=10**7, multiple_of=4)
    """Windows (in fine-tuning conversations) read per corpus and validation: a quarter as many
    different ones, each at 4 values of t. Those of a corpus with fewer are read at more values of
    t.
    """


class CheckpointSection(Section):
    """When the state is saved."""

    every: int = Field(default=500, ge=1)
    """Optimizer steps between checkpoints; one more at the end of the run and on SIGTERM, SIGINT or
    SIGUSR1.
    """
    asynchronous: bool = True
    """Write while training goes on; only the copy to host memory blocks (metric
    checkpoint_blocked_seconds).
    """
    keep_last: int | None = Field(default=None, ge=1)
    """Newest checkpoints to keep; older ones are deleted after a later one is complete. null: all.
    """
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this are never deleted; null: none is exempt."""
    verify: bool = True
    """Compare size and checksum of every file with the commit marker before a checkpoint is loaded;
    the ranks share the files.
    """


class ParallelSection(Section):
    """How one model is spread over ranks. The data-parallel size is what remains of the
    world size.
    """

    tensor: int = Field(default=1, ge=1)
    """Ranks that share every matrix (tensor parallelism)."""
    sequence: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the sequence."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int | None = Field(default=None, ge=2)
    """Model chunks per pipeline stage (interleaved schedule); null: one."""
    layers_per_stage: list[int] | None = Field(default=None, min_length=1)
    """Layers of each pipeline stage in order (with virtual_pipeline: of each chunk, in the order of
    the layers); null: equal shares.
    """
    context: int = Field(default=1, ge=1)
    """Ranks that share a sequence (context parallelism)."""
    overlap_grad_reduce: bool = True
    """Reduce gradients between replicas while the backward pass goes on."""
    overlap_param_gather: bool = True
    """Gather updated parameters between replicas while the next forward pass goes on; needs
    overlap_grad_reduce.
    """
    bucket_size: int | None = Field(default=None, ge=1)
    """Parameters whose gradients (and updated values) are exchanged together; null: 40 million, or
    a million a replica if that is more.
    """
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing, the attention, or whole
    layers.
    """

    @property
    def model_size(self) -> int:
        """Ranks that hold one replica."""
        return self.tensor * self.pipeline * self.context


class LoggingSection(Section):
    """Where metrics go besides metrics.jsonl and the console."""

    every: int = Field(default=10, ge=1)
    """Steps between lines on a console that is not a terminal; metrics.jsonl has every step."""
    tensorboard: bool = False
    """Write TensorBoard event files to RUN/tensorboard."""
    wandb: bool = False
    """Log to Weights & Biases, offline (RUN/wandb) unless you are logged in."""
    wandb_project: str = "llada"
    """Project name at Weights & Biases."""
