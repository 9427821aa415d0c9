"""RunConfig: every setting of a run, with its unit and default.

A config is a YAML file plus dotted overrides (``train.steps=100``). Unknown keys are refused with the nearest right name,
impossible combinations before anything is loaded. The resolved config is saved with each run.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from llada.errors import UserError, did_you_mean
from llada.initial_model import complete_model
from llada.settings import (
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
from llada.strict_yaml import refuse_ambiguous

Task = Literal["pretrain", "sft"]
PROVENANCE = "provenance"
"""Section that a run adds to its config.yaml: revision, versions, lineage. Not a setting."""
_LONGEST_SHOWN = 60
"""Characters of an override that a message repeats."""
SHUFFLE_BLOCK = 10_000
"""Samples per block of the data order; a corpus has the same integer quota in every block."""


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
                raise ValueError(f"sft.pad_group: {self.sft.pad_group} is for task: sft only; leave it out of a pretraining config")
            return self
        if self.data.random_length_probability:
            raise ValueError(
                f"data.random_length_probability: {self.data.random_length_probability} is for pretraining; "
                "conversations are not cut, set 0"
            )
        if self.data.document_mask:
            raise ValueError("data.document_mask: true is for pretraining; a row holds one conversation, leave it out")
        for i, entry in enumerate(self.data.mixture):
            if entry.weight_at:
                raise ValueError(
                    f"data.mixture.{i}.weight_at: changes at token counts are for pretraining; conversations have no fixed number of "
                    "tokens a step, leave it out"
                )
        if any(stage.tokens is not None for stage in self.schedule.stages):
            raise ValueError("schedule.stages: tokens: conversations have no fixed number of tokens a step; give the lengths as steps")
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
        name = "parallel.pipeline" if p.virtual_pipeline is None else "parallel.pipeline x parallel.virtual_pipeline"
        if p.layers_per_stage is None and m.num_layers % chunks:
            raise ValueError(
                f"{name}: {chunks} does not divide model.num_layers = {m.num_layers}; give the shares as parallel.layers_per_stage"
            )
        if p.layers_per_stage is not None:
            if len(p.layers_per_stage) != chunks:
                raise ValueError(f"parallel.layers_per_stage: {len(p.layers_per_stage)} numbers for {name} = {chunks}")
            if min(p.layers_per_stage) < 1 or sum(p.layers_per_stage) != m.num_layers:
                raise ValueError(
                    f"parallel.layers_per_stage: {p.layers_per_stage} must be at least 1 each "
                    f"and add up to model.num_layers = {m.num_layers}"
                )
        if p.overlap_param_gather and not p.overlap_grad_reduce:
            raise ValueError(
                "parallel.overlap_param_gather: true needs parallel.overlap_grad_reduce: true; set both to false to do without overlap"
            )
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


def load_config(path: str | Path, overrides: list[str] | None = None, task: Task | None = None, rewind: int | None = None) -> RunConfig:
    """Read a YAML config, apply dotted overrides, take the model from the folder it names, validate.

    Args:
        path: YAML file.
        overrides: ``key.sub=value`` strings; values are YAML; list items by index (``data.mixture.0.path=...``).
        task: refuse a config for another task (None: any).
        rewind: step from which an override ``lr=RATE`` holds; None: there is no such override.

    Raises:
        UserError: anything wrong, in one line that names the setting.
    """
    raw = read_yaml(Path(path))
    raw.pop(PROVENANCE, None)  # a run's own config.yaml can be used as a config
    for override in overrides or []:
        if rewind is not None and override.startswith("lr="):
            _change_rate(raw, rewind, override)
        else:
            apply_override(raw, override)
    if task is not None and raw.get("task", "pretrain") != task and raw.get("task", "pretrain") in get_args(Task):
        found = raw.get("task", "pretrain")
        raise UserError(f"task: {path} says '{found}', `llada {task}` runs task '{task}' only; use `llada {found}`")
    return build_config(complete_model(raw))


def build_config(raw: dict[str, Any]) -> RunConfig:
    """Validate a plain nested dict. Raises UserError with one line for the first thing that is wrong."""
    data = raw.get("data")
    if raw.get("task") == "sft" and isinstance(data, dict):
        raw = {**raw, "data": {"random_length_probability": 0.0, **data}}  # the default is one of pretraining
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(one_line(error, RunConfig)) from None


def dump_config(config: RunConfig) -> dict[str, Any]:
    """The resolved config as a plain nested dict with the names of the YAML file."""
    return config.model_dump(by_alias=True)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML; `load_config` of it gives the same config."""
    import yaml

    return yaml.safe_dump(dump_config(config), sort_keys=False, default_flow_style=False)


def read_yaml(path: Path, setting: str = "config") -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError, with what the user calls the file, when there is none."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise UserError(f"{setting}: no file '{path}'{_near_file(path)}")
    try:
        refuse_ambiguous(path.read_text(encoding="utf-8"), f"{setting}: {path}")
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"{setting}: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{setting}: {path} must hold a mapping of settings, not a {type(raw).__name__}")
    return raw  # type: ignore[return-value]


def _near_file(path: Path) -> str:
    """A file beside it with a similar name; the ending is not what makes names similar."""
    beside = {other.stem: other for other in path.parent.glob("*.yaml")} if path.parent.is_dir() else {}
    near = difflib.get_close_matches(path.stem, beside, n=1)
    return f" (did you mean '{beside[near[0]]}'?)" if near else ""


def _change_rate(raw: dict[str, Any], step: int, override: str) -> None:
    """Add a constant learning rate from `step` on; it replaces changes at or after that step."""
    holder: dict[str, Any] = {}
    apply_override(holder, override)
    schedule = raw.setdefault("schedule", {})
    if not isinstance(holder["lr"], int | float) or not isinstance(schedule, dict):
        raise UserError(f"override '{override}': the learning rate must be a number, as in lr=1e-4")
    earlier = [entry for entry in schedule.get("rewinds") or [] if entry["step"] < step]
    schedule["rewinds"] = [*earlier, {"step": step, "lr": float(holder["lr"])}]


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``key.sub=value`` in the nested dict, in place. Raises UserError for a text that is none."""
    from omegaconf import OmegaConf

    key, equals, text = override.partition("=")
    override = override if len(override) <= _LONGEST_SHOWN else f"{override[:_LONGEST_SHOWN]}…"  # from here on for messages only
    if not equals or not key:
        raise UserError(f"override '{override}': write key.sub=value, as in train.steps=100")
    try:
        refuse_ambiguous(text, f"override '{override}'")
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except UserError:
        raise
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


def one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem as `setting: value, what is allowed (nearest name)`; unknown names first, since they explain the missing ones."""
    problems = error.errors(include_url=False)
    problems.sort(key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        prefix = where.removesuffix(str(first["loc"][-1]))
        names = [prefix + name for name in _setting_names(first["loc"][:-1], root)]
        return f"{where}: unknown setting{did_you_mean(where, names)}; allowed here: {', '.join(names)}"
    if first["type"] == "missing":
        return f"{where}: missing, this setting has no default"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        # Of a group of settings the message names the one that is meant, of a single setting it does not.
        between = "." if re.match(r"[a-z_]+(\[\d+\])?: ", message) else ": "
        return f"{where}{between}{message}" if where else message
    near = ""
    if first["type"] == "literal_error":
        near = did_you_mean(str(first["input"]), [part.strip("' ") for part in first["ctx"]["expected"].replace(" or ", ", ").split(", ")])
    return f"{where}: {first['input']!r} is not allowed: {message[0].lower()}{message[1:]}{near}"


def _setting_names(loc: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The names allowed in the section at `loc` of the settings in `root`."""
    section = root
    for part in loc:
        if isinstance(part, int):
            continue
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        annotation = fields[part].annotation
        section = next(iter(get_args(annotation)), annotation)  # type: ignore[assignment]
    return [field.alias or name for name, field in section.model_fields.items()]
