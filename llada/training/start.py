"""Where a run starts: its latest sound checkpoint, the weights of another run, or nothing."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llada import events
from llada.config import RunConfig, build_config, dump_config, load_config
from llada.data.base import TrainingData
from llada.engine.base import Engine
from llada.engine.layout import gather_world, world_from_environment
from llada.errors import UserError
from llada.hf import folder as hf
from llada.model.attention import kernel_name
from llada.model.stored import StoredTensors
from llada.tokenizer import Tokenizer
from llada.training import checkpoint, metrics
from llada.training.folder import refuse_others
from llada.training.guard import Applied
from llada.training.schedule import Schedule

_MAY_CHANGE = (
    "run",
    "train.steps",
    "train.max_skipped",
    "logging",
    "checkpoint",
    "validation",
    "parallel",
    "batch.micro",
    "data.verify_bytes",
    "data.mixture",
    "schedule",
)
"""Settings that a resumed run may change. The data is compared by fingerprint, the schedule by the learning rates already used."""
_CONSTANTS = ("rope_theta", "norm_eps")
"""Settings of the model that no tensor's shape shows: another value quietly makes another model of the same weights."""
_NAME_SPIKES = ("train.spike_sigma", "train.spike_loss_factor", "train.spike_norm_factor", "train.spike_window")
"""Settings that a resumed run may change, too, unless train.skip_spikes: without it they only name spikes."""


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        folder: a checkpoint or a Hugging Face folder; None: nothing.
        step, tokens: done already.
        optimizer: whether the checkpoint's optimizer counts.
        lineage: where the weights came from, oldest first.
        notes: lines for the console.
        aside: later checkpoints that a rewind leaves behind.
        recent, validation: of the checkpoint, see `checkpoint.State`.
    """

    folder: Path | None
    step: int
    tokens: int
    optimizer: bool
    lineage: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    aside: list[Path] = field(default_factory=list)
    recent: list[Applied] = field(default_factory=list)
    validation: dict[str, Any] | None = None

    def load(self, engine: Engine) -> None:
        """Give the engine what the run starts from; collective."""
        if self.folder is None:
            return
        if hf.is_folder(self.folder):
            engine.load_canonical(hf.open_folder(self.folder, setting="run.init_from").weights)
        else:
            engine.load(self.folder / "model", optimizer=self.optimizer)


def versions(config: RunConfig, threads: int) -> dict[str, str]:
    """What decides the arithmetic besides the config."""
    names = ("torch", "megatron-core", "numpy")
    found = {name: version(name) for name in names} | {"run.threads": str(threads), "machine": platform.machine()}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name(), "attention": kernel_name()}
        found["run.deterministic"] = str(config.run.deterministic)
    return found


def find_start(
    config: RunConfig, data: TrainingData, root: Path, threads: int | None, allow_changed: bool, rewind: int | None = None
) -> Start:
    """The latest sound checkpoint of this run, else run.init_from, else nothing; the same on every rank (collective).

    With `rewind`, the checkpoint after that many steps instead of the latest. A run that was rewound so already, with the same
    schedule, just goes on: the command may be repeated after an interruption.

    `threads` of this rank; None for a look from a machine that will not run it, whose versions say nothing.

    Raises:
        UserError: a checkpoint of another run, weights that do not fit, damage where there is nothing to go back to, checkpoints that
            were written and are not there any more.
    """
    notes = [f"ignored {folder}: no {checkpoint.MARKER} file, its save was cut off" for folder in checkpoint.ignored(root)]
    found = checkpoint.committed(root)
    if rewind is not None:
        target = root / checkpoint.name(rewind)
        if target not in found:
            there = ", ".join(str(checkpoint.step_of(path)) for path in found) or "none"
            raise UserError(f"--rewind: no checkpoint after step {rewind} in {root}; there are: {there}")
        later = found[found.index(target) + 1 :]
        if later and not _rewound(config, later[-1], rewind):
            return _rewind(config, data, target, later, threads, allow_changed, notes)
    for folder in reversed(found):
        problems = _damage(config, folder)
        if problems:
            notes.append(f"ignored {folder}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
            continue
        return _resume(config, data, folder, threads, allow_changed, notes)
    if found:
        raise UserError(
            f"resume: no checkpoint in {root} is sound: {notes[-1].removeprefix('ignored ')}; "
            "choose another run.dir to start over, or move the run folder away"
        )
    _refuse_lost(root)
    if config.run.init_from:
        return _from_weights(config, data, allow_changed, notes)
    if config.task == "sft":
        notes.append("run.init_from: not given, this fine-tuning starts from random weights")
    return Start(None, 0, 0, False, [], notes)


def _refuse_lost(root: Path) -> None:
    """Raises UserError where a run without a complete checkpoint once had one: starting over would replace what it did.

    A run that was killed before its first checkpoint has none either; its event log names no checkpoint.
    """
    steps = [line["step"] for line in events.read(root.parent) if line["event"] == "checkpoint" and "step" in line]
    without_marker = checkpoint.unmarked(root)
    if steps:
        had = f"the checkpoint after step {steps[-1]} was written"
    elif without_marker:
        had = f"{without_marker[-1]} lost its {checkpoint.MARKER} file"
    elif _lost_events(root.parent):
        had = f"{metrics.FILE} has steps, {events.FILE} is gone"
    else:
        return
    raise UserError(
        f"run.dir: '{root.parent}' has lost its checkpoints: {had}, and {root} holds no complete one; put them back, "
        "choose another run.dir to start over, or move the run folder away"
    )


def _lost_events(folder: Path) -> bool:
    """Whether steps were taken here and the log that would name checkpoints is gone: every run writes to it before its first step."""
    written = folder / metrics.FILE
    return written.is_file() and written.stat().st_size > 0 and not events.read(folder)


def _damage(config: RunConfig, folder: Path) -> list[str]:
    """What is wrong with a checkpoint; every rank looks at its share of the files."""
    if not config.checkpoint.verify:
        return []
    rank, size, _ = world_from_environment()
    return [problem for share in gather_world(checkpoint.damage(folder, rank, size)) for problem in share]


def _resume(config: RunConfig, data: TrainingData, folder: Path, threads: int | None, allow_changed: bool, notes: list[str]) -> Start:
    state = checkpoint.read_state(folder)
    _same_architecture(f"resume from {folder}: it", config, state.config["model"])
    changes = _changes(config, data, folder, state, threads)
    if changes and not allow_changed:
        raise UserError(f"resume from {folder}: {changes[0]} changed since; restore it, use another run.dir, or pass --allow-changed")
    lineage = state.lineage + ([{"resumed_at_step": state.step, "changed": changes}] if changes else [])
    recent = [Applied(int(step), loss, norm) for step, loss, norm in state.recent]
    return Start(folder, state.step, state.tokens, True, lineage, notes, recent=recent, validation=state.validation)


def _rewind(
    config: RunConfig, data: TrainingData, target: Path, later: list[Path], threads: int | None, allow_changed: bool, notes: list[str]
) -> Start:
    problems = _damage(config, target)
    if problems:
        raise UserError(f"--rewind: {problems[0]}; choose another step")
    start = _resume(config, data, target, threads, allow_changed, notes)
    left = checkpoint.step_of(later[-1])
    record = {"rewound_to_step": start.step, "from_step": left, "schedule": dump_config(config)["schedule"]}
    notes.append(f"rewound from step {left} to step {start.step}; later checkpoints are set aside as step_*.rewound-*")
    return replace(start, lineage=[*start.lineage, record], notes=notes, aside=later)


def _rewound(config: RunConfig, folder: Path, step: int) -> bool:
    """Whether a checkpoint comes from a run that was rewound to this step with this schedule."""
    schedule = dump_config(config)["schedule"]
    lineage = checkpoint.read_state(folder).lineage
    return any(entry.get("rewound_to_step") == step and entry["schedule"] == schedule for entry in lineage)


def foresee(config: RunConfig, data: TrainingData, root: Path, allow_changed: bool, rewind: int | None = None) -> Start:
    """Where a run would start, without comparing checksums and versions: for whoever submits it elsewhere.

    Raises:
        UserError: as `find_start`; and for a folder that holds another run, with or without a checkpoint, or something else than a
            run, and for a corpus whose tokenizer was replaced.
    """
    refuse_others(root.parent)
    data.tokenizer()  # raises
    written = root.parent / "config.yaml"
    if written.is_file() and not allow_changed:
        difference = checkpoint.first_difference(dump_config(load_config(written)), dump_config(config), _MAY_CHANGE)
        if difference:
            raise UserError(
                f"run.dir: '{root.parent}' holds a run of another config, {difference}; choose another run.dir, or pass --allow-changed"
            )
    unread = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"verify": False})})
    return find_start(unread, data, root, None, allow_changed, rewind)


def _changes(config: RunConfig, data: TrainingData, folder: Path, state: checkpoint.State, threads: int | None) -> list[str]:
    """What differs from the checkpoint and would make the run another one."""
    watched = () if config.train.skip_spikes else _NAME_SPIKES
    found = [checkpoint.first_difference(state.config, dump_config(config), (*_MAY_CHANGE, *watched))]
    if state.data != data.fingerprint:
        found.append(f"data.mixture: data {state.data} -> {data.fingerprint}")
    old = _settings(state.config, folder)
    before, now = Schedule(old.schedule, old.tokens_per_step), Schedule(config.schedule, config.tokens_per_step)
    for step in range(state.step):
        rates = before.learning_rate(step), now.learning_rate(step)
        if rates[0] != rates[1]:
            found.append(f"schedule.stages: learning rate of step {step + 1}: {rates[0]:g} -> {rates[1]:g}")
            break
    current = versions(config, threads) if threads is not None else {}
    if not _threads_matter(config, old, state):
        current.pop("run.threads", None)
    found += [f"{key}: {state.versions.get(key)} -> {current[key]}" for key in current if state.versions.get(key) != current[key]]
    return [change for change in found if change is not None]


def _settings(saved: dict[str, Any], folder: Path) -> RunConfig:
    """The settings of a checkpoint. Raises UserError where this version does not allow one of them any more."""
    try:
        return build_config(saved)
    except UserError as error:
        raise UserError(
            f"resume from {folder}: this version of llada does not allow a setting that it was saved with, {error}; "
            "go on with the version that wrote it, or start another run from its weights (run.init_from)"
        ) from None


def _threads_matter(config: RunConfig, old: RunConfig, state: checkpoint.State) -> bool:
    """Whether another number of CPU threads a rank would make another run.

    It would where both configs set it. Where the machine decides it, it changes with the number of ranks, and then the layout has
    changed, which is allowed; on the same layout it decides the order of sums on the CPU.
    """
    if config.run.threads and old.run.threads:
        return True
    same_layout = state.ranks in (0, world_from_environment()[1]) and config.parallel == old.parallel
    return same_layout and not torch.cuda.is_available()


def _same_architecture(subject: str, config: RunConfig, old: dict[str, Any]) -> None:
    """Refuse weights of a model section that do not fit the run's, naming both."""
    new = dump_config(config)["model"]
    allowed = tuple(f"model.{key}" for key in ("embedding_init_std", *_CONSTANTS))
    difference = checkpoint.first_difference(_comparable(old), _comparable(new), allowed, "model.")
    if difference:
        raise UserError(
            f"{subject} holds another architecture ({_shape(old)}) than the config ({_shape(new)}); the first difference is {difference}"
        )


def _comparable(model: dict[str, Any]) -> dict[str, Any]:
    """A model section with the number of its key/value heads in figures."""
    return {**model, "num_query_groups": model.get("num_query_groups") or model.get("num_attention_heads")}


def _same_constants(source: Path, config: RunConfig, old: dict[str, Any], allow_changed: bool) -> list[str]:
    """What the config states otherwise than the weights were trained with, though every tensor fits; refused unless it is allowed."""
    changed = []
    for key in _CONSTANTS:
        before, now = old.get(key), getattr(config.model, key)
        if before is None or before == now:
            continue
        if not allow_changed:
            raise UserError(
                f"model.{key}: {now!r}, but run.init_from: {source} has {before!r}; leave it out of the config to take that, or pass "
                "--allow-changed where the change is meant"
            )
        changed.append(f"model.{key}: {before!r} -> {now!r}")
    return changed


def _shape(model: dict[str, Any]) -> str:
    return f"{model['num_layers']} layers of width {model['hidden_size']}, vocabulary {model['vocab_size']}"


def _from_weights(config: RunConfig, data: TrainingData, allow_changed: bool, notes: list[str]) -> Start:
    """Weights of another run or of a Hugging Face folder, if they fit: the same shapes, and ids that mean the same tokens."""
    assert config.run.init_from is not None
    if hf.is_folder(config.run.init_from):
        return _from_folder(config, data, Path(config.run.init_from), allow_changed, notes)
    source = checkpoint.resolve(config.run.init_from, "run.init_from")
    state = checkpoint.read_state(source, "run.init_from")
    _same_architecture(f"run.init_from: {source}", config, state.config["model"])
    changed = _same_constants(source, config, state.config["model"], allow_changed)
    _same_tokenizer(source, checkpoint.load_tokenizer(source, "run.init_from"), data, source / checkpoint.TOKENIZER)
    problems = _damage(config, source)
    if problems:
        raise UserError(f"run.init_from: {problems[0]}; the checkpoint is damaged, take another one")
    what = config.run.init_what
    if what != "weights" and not StoredTensors(source / "model").has_masters:
        raise UserError(f"run.init_what: '{what}', but {source} is an imported checkpoint, of weights alone; use weights")
    if state.data == data.fingerprint and state.config["seed"] == config.seed:
        notes.append(
            f"seed: {config.seed} and the data are those of {source}: this run reads the same samples again, from the first; "
            "set another seed for another order"
        )
    own = {"init_from": str(source), "step": state.step, "tokens": state.tokens, "what": what}
    own["sequence_length"] = state.config["data"]["sequence_length"]
    own |= {"changed": changed} if changed else {}
    notes.append(_model_line(config))
    return Start(source, 0, 0, what == "weights+optimizer", [*state.lineage, own], notes)


def _from_folder(config: RunConfig, data: TrainingData, source: Path, allow_changed: bool, notes: list[str]) -> Start:
    """Weights of a Hugging Face folder, whose vocabulary has to be complete as it is."""
    if config.run.init_what != "weights":
        raise UserError(f"run.init_what: '{config.run.init_what}', but '{source}' is a Hugging Face folder, of weights alone; use weights")
    # First: a vocabulary without a mask token is what differs from the config's most often.
    tokenizer = Tokenizer.load(source, require_mask=False)
    _same_tokenizer(source, tokenizer, data, source)
    folder = hf.open_folder(source, setting="run.init_from")
    hf.check_mask(folder, tokenizer)
    _same_architecture(f"run.init_from: {source}", config, folder.model.model_dump())
    changed = _same_constants(source, config, folder.model.model_dump(), allow_changed)
    own: dict[str, Any] = {"imported": source.resolve().name, "architecture": folder.architecture, "sequence_length": folder.longest}
    own |= {"changed": changed} if changed else {}
    notes.append(_model_line(config))
    return Start(source, 0, 0, False, [own], notes)


def _model_line(config: RunConfig) -> str:
    model = config.model.model_dump(exclude={"embedding_init_std"}, exclude_none=True)
    return f"model: {', '.join(f'{key} {value}' for key, value in model.items())}"


def _same_tokenizer(source: Path, loaded: Tokenizer, data: TrainingData, tokenizer: Path) -> None:
    if loaded.mask_id < 0:
        raise UserError(
            f"run.init_from: the tokenizer of {source} has no mask token; `llada convert from-hf {source} OUT --add-mask-token` makes a "
            "checkpoint that has one, with a row of its own"
        )
    found, wanted = loaded.fingerprint, data.manifest.tokenizer_fingerprint
    if found != wanted:
        raise UserError(
            f"run.init_from: {source} was trained with another tokenizer ({found[:16]}) than that of "
            f"{data.corpora[0].folder} ({wanted[:16]}); prepare the data with {tokenizer}"
        )
