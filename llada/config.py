"""RunConfig: every setting of a run, with its unit and default.

A config is a YAML file plus dotted overrides (``train.steps=100``). Unknown keys are refused with the nearest right name,
impossible combinations before anything is loaded. The resolved config is saved with each run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llada.errors import UserError, did_you_mean

Task = Literal["pretrain", "sft"]
PROVENANCE = "provenance"
"""Section that a run adds to its config.yaml: revision, versions, lineage. Not a setting."""
SHUFFLE_BLOCK = 10_000
"""Samples per block of the data order; a corpus has the same integer quota in every block."""


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values are not coerced between kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, strict=True)


class RunSection(Section):
    """Where the run lives and how it computes."""

    dir: str
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/. A run that finds a committed checkpoint here continues from it."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of torch per rank; 0: the cores of this process divided by the ranks on the machine. Compared at resume."""
    deterministic: bool = False
    """On GPU, use deterministic kernels, so that a restart repeats the run bit for bit. On CPU it always does."""
    init_from: str | None = None
    """Checkpoint folder to take weights from when the run starts (not when it resumes); recorded as lineage."""
    init_what: Literal["weights", "weights+optimizer"] = "weights"
    """What to take from init_from: the weights alone, or the optimizer's moments and step count too."""


class TrainSection(Section):
    """How long."""

    steps: int = Field(ge=1)
    """Optimizer steps in all. Nothing else derives from it: extending a run never changes what came before."""
    max_skipped: int = Field(default=3, ge=0)
    """Steps in a row whose loss or gradient may be non-finite (they update nothing) before the run stops."""


class BatchSection(Section):
    """Sizes of a step, in sequences."""

    global_: int = Field(alias="global", ge=1)
    """Sequences per optimizer step, over all ranks and accumulation steps."""
    micro: int = Field(ge=1)
    """Sequences per forward and backward pass of one rank."""


class CorpusEntry(Section):
    """One corpus of the mixture."""

    path: str
    """Folder made by `llada data prepare`."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other weights (no unit)."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Passes over the corpus after which it leaves the mixture and its share goes to the others by weight; null: no cap."""


class DataSection(Section):
    """What is read."""

    sequence_length: int = Field(ge=8)
    """Tokens per sequence (window)."""
    mixture: list[CorpusEntry] = Field(min_length=1)
    """The corpora. All must have been prepared with the same tokenizer."""
    document_mask: bool = False
    """true: documents of a window do not attend to each other and each has its own t. The paper's model was trained without."""
    random_length_probability: float = Field(default=0.01, ge=0, le=1)
    """Share of the windows that are cut at a uniform random length into two attention segments (the paper: 0.01)."""
    verify_bytes: int = Field(default=2_000_000_000, ge=0)
    """A corpus of at most this many bytes is verified as a whole when the run starts; for larger ones use `llada data verify`."""


class ModelSection(Section):
    """Shape of the transformer: Llama-like, bidirectional, no biases, RMSNorm, RoPE, SwiGLU, dropout 0."""

    num_layers: int = Field(ge=1)
    """Transformer layers."""
    hidden_size: int = Field(ge=2)
    """Width of the residual stream (d_model)."""
    num_attention_heads: int = Field(ge=1)
    """Query heads; the head dimension is hidden_size / num_attention_heads."""
    num_query_groups: int | None = Field(default=None, ge=1)
    """Key/value heads (grouped-query attention); null: as many as query heads."""
    ffn_hidden_size: int = Field(ge=1)
    """Inner width of the SwiGLU."""
    vocab_size: int = Field(ge=2)
    """Rows of the embedding and the head (padding rows included); at least the rows of the corpora's tokenizer."""
    rope_theta: float = Field(default=500000.0, gt=0)
    """Base of the rotary embedding."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """true: the head uses the embedding's weight."""
    embedding_init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial embedding; null: 1/sqrt(hidden_size), as published. Narrow models learn context sooner with 1."""

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
            raise ValueError(f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads = {heads}")
        if self.head_dim % 2:
            raise ValueError(f"hidden_size: the head dimension {self.head_dim} must be even (rotary embedding)")
        if heads % groups:
            raise ValueError(f"num_query_groups: {groups} does not divide num_attention_heads = {heads}")
        return self


class ObjectiveSection(Section):
    """The training objective."""

    name: Literal["masked"] = "masked"
    """masked: LLaDA's masked diffusion (arXiv 2502.09992, Eq. 3)."""
    timesteps: Literal["stratified", "iid"] = "stratified"
    """How t is drawn for the segments of a step: stratified over the whole global step, or independently."""
    masking: Literal["bernoulli", "fixed_count"] = "bernoulli"
    """bernoulli: each token masked with p = (1 - eps) t + eps, weight 1/p. fixed_count: n = 1 + floor(t L) of the L tokens, weight L/n."""
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
    """One piece of the learning-rate schedule. `steps` or `tokens` gives its length; a constant last piece may have none: no end."""

    shape: Literal["constant", "linear", "cosine"]
    """Form of the piece, from `start` to `end`."""
    start: float | None = Field(default=None, ge=0)
    """Learning rate at the piece's start; null: where the piece before ended (0 for the first)."""
    end: float | None = Field(default=None, ge=0)
    """Learning rate at the piece's end; for `constant` leave it out."""
    steps: int | None = Field(default=None, ge=1)
    """Length in optimizer steps."""
    tokens: int | None = Field(default=None, ge=1)
    """Length in tokens (rounded up to whole steps of batch.global x data.sequence_length)."""

    @model_validator(mode="after")
    def _complete(self) -> StageEntry:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens: give one length, not both")
        if self.shape == "constant" and self.end is not None and self.end != self.start:
            raise ValueError(f"end: {self.end} makes no sense for a constant piece; use shape: linear")
        if self.shape != "constant" and self.end is None:
            raise ValueError(f"end: missing, a {self.shape} piece needs the learning rate it ends at")
        return self


class ScheduleSection(Section):
    """The learning rate, piece by piece, in absolute lengths."""

    stages: list[StageEntry] = Field(min_length=1)
    """The pieces in order."""

    @model_validator(mode="after")
    def _open_end(self) -> ScheduleSection:
        for i, stage in enumerate(self.stages):
            endless = stage.steps is None and stage.tokens is None
            if endless and (i < len(self.stages) - 1 or stage.shape != "constant"):
                raise ValueError(f"stages[{i}]: give its length as steps or tokens; only a constant last stage may go on without end")
        return self


class ValidationSection(Section):
    """NELBO on the corpora's own validation documents, always with fixed-count masking and the same noise each time."""

    every: int = Field(default=500, ge=1)
    """Optimizer steps between validations; one more at the end of the run."""
    windows: int = Field(default=256, ge=8, multiple_of=8)
    """Windows per corpus and validation; a corpus with fewer is read again with other masks. Split over 8 independent rotations of t."""


class CheckpointSection(Section):
    """When the state is saved."""

    every: int = Field(default=500, ge=1)
    """Optimizer steps between checkpoints; one more at the end of the run and on SIGTERM, SIGINT or SIGUSR1."""


class ParallelSection(Section):
    """How one model is spread over ranks. The data-parallel size is what remains of the world size."""

    tensor: int = Field(default=1, ge=1)
    """Ranks that share every matrix (tensor parallelism)."""
    sequence: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the sequence."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int | None = Field(default=None, ge=2)
    """Model chunks per pipeline stage (interleaved schedule); null: one."""
    context: int = Field(default=1, ge=1)
    """Ranks that share a sequence (context parallelism)."""

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


class RunConfig(Section):
    """A run: a pure function of this, whatever the layout."""

    task: Task = "pretrain"
    """Which kind of training this is; `llada pretrain` refuses another one's config."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of every random draw: order, t, masks, random lengths, initial weights."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """fp32: the reference. bf16: parameters and activations bf16; master weights, moments, gradient sums, norms, RoPE and loss fp32."""
    engine: Literal["megatron"] = "megatron"
    """Megatron-Core: tensor, pipeline and context parallelism with the distributed optimizer."""
    run: RunSection
    train: TrainSection
    batch: BatchSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
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
        if m.num_layers % chunks:
            name = "parallel.pipeline" if p.virtual_pipeline is None else "parallel.pipeline x parallel.virtual_pipeline"
            raise ValueError(f"{name}: {chunks} does not divide model.num_layers = {m.num_layers}")
        if p.virtual_pipeline is not None and p.pipeline == 1:
            raise ValueError(f"parallel.virtual_pipeline: {p.virtual_pipeline} needs parallel.pipeline > 1, which is 1")
        if p.sequence and p.tensor == 1:
            raise ValueError("parallel.sequence: true needs parallel.tensor > 1, which is 1")
        split = p.context * (p.tensor if p.sequence else 1)
        if self.data.sequence_length % split:
            raise ValueError(
                f"data.sequence_length: {self.data.sequence_length} is not a multiple of parallel.context x parallel.tensor = {split}"
            )
        if self.batch.global_ % self.batch.micro:
            raise ValueError(f"batch.global: {self.batch.global_} is not a multiple of batch.micro = {self.batch.micro}")
        return self

    def check_world(self, world_size: int) -> int:
        """Return the data-parallel size for `world_size` ranks.

        Raises UserError when the layout does not fill the world or the batch does not divide over its replicas.
        """
        p = self.parallel
        if world_size % p.model_size:
            raise UserError(
                f"parallel: tensor x pipeline x context = {p.tensor} x {p.pipeline} x {p.context} = {p.model_size} ranks per replica "
                f"do not divide the world size {world_size}"
            )
        data = world_size // p.model_size
        if self.batch.global_ % (self.batch.micro * data):
            raise UserError(
                f"batch.global: {self.batch.global_} is not a multiple of batch.micro x data-parallel size = {self.batch.micro} x {data} "
                f"(world size {world_size})"
            )
        micro_batches = self.batch.global_ // (self.batch.micro * data)
        if p.virtual_pipeline is not None and micro_batches % p.pipeline:
            raise UserError(
                f"parallel.virtual_pipeline: {micro_batches} micro-batches per step are not a multiple of parallel.pipeline = {p.pipeline}"
            )
        return data


def load_config(path: str | Path, overrides: list[str] | None = None, task: Task | None = None) -> RunConfig:
    """Read a YAML config, apply dotted overrides, validate.

    Args:
        path: YAML file.
        overrides: ``key.sub=value`` strings; values are YAML; list items by index (``data.mixture.0.path=...``).
        task: refuse a config for another task (None: any).

    Raises:
        UserError: anything wrong, in one line that names the setting.
    """
    raw = _read_yaml(Path(path))
    raw.pop(PROVENANCE, None)  # a run's own config.yaml can be used as a config
    for override in overrides or []:
        _apply(raw, override)
    if task is not None and raw.get("task", "pretrain") != task and raw.get("task", "pretrain") in get_args(Task):
        found = raw.get("task", "pretrain")
        raise UserError(f"task: {path} says '{found}', `llada {task}` runs task '{task}' only; use `llada {found}`")
    return build_config(raw)


def build_config(raw: dict[str, Any]) -> RunConfig:
    """Validate a plain nested dict. Raises UserError with one line for the first thing that is wrong."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None


def dump_config(config: RunConfig) -> dict[str, Any]:
    """The resolved config as a plain nested dict with the names of the YAML file."""
    return config.model_dump(by_alias=True)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML; `load_config` of it gives the same config."""
    import yaml

    return yaml.safe_dump(dump_config(config), sort_keys=False, default_flow_style=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise UserError(f"config: no file '{path}'")
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"config: {path} must hold a mapping of settings, not a {type(raw).__name__}")
    return raw  # type: ignore[return-value]


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one ``key.sub=value`` in the nested dict, in place."""
    from omegaconf import OmegaConf

    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': write key.sub=value, as in train.steps=100")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={override.partition('=')[2]}"]))["value"]  # type: ignore[index,call-overload]
    except Exception as error:  # any parser complaint is the user's typo
        raise UserError(f"override '{override}': the value is not valid YAML: {' '.join(str(error).split())}") from None
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = _child(node, part, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"{key}: '{parents[-1]}' is a single value and has no setting '{last}'")


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if isinstance(node, dict):
        return node[part]
    raise UserError(f"{key}: '{part}' lies below a single value")


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"{key}: '{part}' is not an index of this list of {len(node)}; allowed 0 to {len(node) - 1}")
    return int(part)


def _one_line(error: ValidationError) -> str:
    """The first problem as `setting: value, what is allowed (nearest name)`; unknown names first, since they explain the missing ones."""
    problems = error.errors(include_url=False)
    problems.sort(key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        prefix = where.removesuffix(str(first["loc"][-1]))
        names = [prefix + name for name in _setting_names(first["loc"][:-1])]
        return f"{where}: unknown setting{did_you_mean(where, names)}; allowed here: {', '.join(names)}"
    if first["type"] == "missing":
        return f"{where}: missing, this setting has no default"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        prefix = f"{where}." if where else ""
        return f"{prefix}{message}"
    near = ""
    if first["type"] == "literal_error":
        near = did_you_mean(str(first["input"]), [part.strip("' ") for part in first["ctx"]["expected"].replace(" or ", ", ").split(", ")])
    return f"{where}: {first['input']!r} is not allowed: {message[0].lower()}{message[1:]}{near}"


def _setting_names(loc: tuple[int | str, ...]) -> list[str]:
    """The names allowed in the section at `loc`."""
    section: type[BaseModel] = RunConfig
    for part in loc:
        if isinstance(part, int):
            continue
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        annotation = fields[part].annotation
        section = next(iter(get_args(annotation)), annotation)  # type: ignore[assignment]
    return [field.alias or name for name, field in section.model_fields.items()]
