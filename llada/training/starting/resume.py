"""Decides what a run resumes from: its newest valid checkpoint, other weights, or random ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llada import events
from llada.checkpoint.format import read_state
from llada.checkpoint.names import (
    MARKER,
    checkpoint_name,
    checkpoint_step,
    committed_checkpoints,
    unfinished_checkpoints,
    unmarked_checkpoints,
)
from llada.config import RunConfig, dump_config
from llada.data.training_data import TrainingData
from llada.errors import UserError
from llada.formatting import first_of
from llada.training.configure import load_config
from llada.training.guard import Applied
from llada.training.run_folder import refuse_foreign_folder
from llada.training.starting.initial_weights import start_from_weights
from llada.training.starting.settings import (
    MAY_CHANGE,
    find_changes,
    first_difference,
    refuse_other_architecture,
)
from llada.training.starting.start import Start
from llada.training.starting.verification import verify_on_all_ranks


def resolve_resume(
    config: RunConfig,
    data: TrainingData,
    root: Path,
    threads: int | None,
    allow_changed: bool,
    rewind: int | None = None,
) -> Start:
    """Decide what a run starts from, the same on every rank; collective.

    That is the newest valid checkpoint of this run, else `run.init_from`, else random weights.

    Args:
        config, data: the run's config and data.
        root: RUN/checkpoints.
        threads: CPU threads of this rank; None on a machine that only submits the run, whose
            versions are not compared.
        allow_changed: resume although settings, data or versions changed.
        rewind: the checkpoint after this many steps instead of the latest. A run that was rewound
            there already, with the same schedule, continues: the command may be repeated after an
            interruption.

    Raises:
        UserError: a checkpoint of another run, weights that do not fit, damage where there is
            nothing to go back to, checkpoints that were written and are gone.
    """
    run = _Resumption(config, data, root, threads, allow_changed)
    notes = [
        f"ignored {folder}: no {MARKER} file, its save was cut off"
        for folder in unfinished_checkpoints(root)
    ]
    checkpoints = committed_checkpoints(root)

    # A rewind names its checkpoint.
    if rewind is not None:
        target, later = _split_at(root, checkpoints, rewind)
        if later and not run.was_rewound(later[-1], rewind):
            return run.rewind_to(target, later, notes)

    if checkpoints:
        return run.resume_from_newest(checkpoints, notes)
    # There is none: a new run, or one that has lost what it did.
    _refuse_lost(root)
    return _start_new(config, data, allow_changed, notes)


def _start_new(
    config: RunConfig, data: TrainingData, allow_changed: bool, notes: list[str]
) -> Start:
    """Start at step 0: from `run.init_from`, or from random weights."""
    if config.run.init_from:
        return start_from_weights(config, data, config.run.init_from, allow_changed, notes)
    if config.task == "sft":
        notes.append("run.init_from: not given, this fine-tuning starts from random weights")
    return Start(notes=notes)


def _split_at(root: Path, checkpoints: list[Path], step: int) -> tuple[Path, list[Path]]:
    """Return the checkpoint to rewind to, and those after it."""
    target = root / checkpoint_name(step)
    if target not in checkpoints:
        steps = ", ".join(str(checkpoint_step(path)) for path in checkpoints) or "none"
        raise UserError(f"--rewind: no checkpoint after step {step} in {root}; there are: {steps}")
    return target, checkpoints[checkpoints.index(target) + 1 :]


def preview_resume(
    config: RunConfig,
    data: TrainingData,
    root: Path,
    allow_changed: bool,
    rewind: int | None = None,
) -> Start:
    """Decide what a run would start from, on a machine that submits it to another one.

    Checksums and versions are not compared. The other arguments are those of `resolve_resume`.

    Raises:
        UserError: as `resolve_resume`; also for a folder that contains another run, with or without
            a checkpoint, or something else than a run, and for a corpus whose tokenizer was
            replaced.
    """
    refuse_foreign_folder(root.parent)
    data.check_tokenizers()
    saved = root.parent / "config.yaml"
    if saved.is_file() and not allow_changed:
        difference = first_difference(
            dump_config(load_config(saved)), dump_config(config), MAY_CHANGE
        )
        if difference:
            raise UserError(
                f"run.dir: '{root.parent}' contains a run with a different config, {difference};"
                " choose another run.dir, or pass --allow-changed"
            )
    unverified = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"verify": False})}
    )
    return resolve_resume(unverified, data, root, None, allow_changed, rewind)


def _refuse_lost(root: Path) -> None:
    """Refuse a run without a complete checkpoint that once had one: starting over would replace it.

    A run that was killed before its first checkpoint has none either, but then its event log names
    no checkpoint.
    """
    steps = [
        event["step"]
        for event in events.read(root.parent)
        if event["event"] == "checkpoint" and "step" in event
    ]
    unmarked = unmarked_checkpoints(root)
    if steps:
        evidence = f"the checkpoint after step {steps[-1]} was written"
    elif unmarked:
        evidence = f"{unmarked[-1]} lost its {MARKER} file"
    elif _has_lost_events(root.parent):
        evidence = "metrics.jsonl has steps, events.jsonl is gone"
    else:
        return
    raise UserError(
        f"run.dir: '{root.parent}' has lost its checkpoints: {evidence}, and {root} has no"
        " complete one; put them back, choose another run.dir to start over, or move the run folder"
        " away"
    )


def _has_lost_events(folder: Path) -> bool:
    """Return whether steps were taken here and the log that would name checkpoints is gone.

    Every run writes to the event log before its first step.
    """
    metrics = folder / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0 and not events.read(folder)


@dataclass(frozen=True)
class _Resumption:
    """Resumes one run from one of its own checkpoints; see `resolve_resume` for the attributes."""

    config: RunConfig
    data: TrainingData
    root: Path
    threads: int | None
    allow_changed: bool

    def resume_from_newest(self, checkpoints: list[Path], notes: list[str]) -> Start:
        """Continue after the newest valid checkpoint; damaged ones are reported and passed over.

        Args:
            checkpoints: all complete ones, oldest first; at least one.
            notes: lines for the console so far.
        """
        reason = ""
        for folder in reversed(checkpoints):
            problems = verify_on_all_ranks(self.config, folder)
            if not problems:
                return self.resume_from(folder, notes)
            reason = f"{folder}: {first_of(problems)}"
            notes = [*notes, f"ignored {reason}"]
        raise UserError(
            f"resume: {self.root} contains no valid checkpoint: {reason}; choose another run.dir to"
            " start over, or move the run folder away"
        )

    def resume_from(self, folder: Path, notes: list[str]) -> Start:
        """Continue after a checkpoint. Raises UserError if it is of another run."""
        state = read_state(folder)
        refuse_other_architecture(f"resume from {folder}: it", self.config, state.config["model"])
        changes = find_changes(self.config, self.data, folder, state, self.threads)
        if changes and not self.allow_changed:
            raise UserError(
                f"resume from {folder}: {changes[0]} has changed since the checkpoint; restore it,"
                " use another run.dir, or pass --allow-changed"
            )
        lineage = list(state.lineage)
        if changes:
            lineage.append({"resumed_at_step": state.step, "changed": changes})
        return Start(
            folder,
            state.step,
            state.tokens,
            optimizer=True,
            lineage=lineage,
            notes=notes,
            recent=[Applied(int(step), loss, norm) for step, loss, norm in state.recent],
            validation=state.validation,
        )

    def rewind_to(self, target: Path, later: list[Path], notes: list[str]) -> Start:
        """Continue after an earlier checkpoint; the `later` ones are superseded."""
        problems = verify_on_all_ranks(self.config, target)
        if problems:
            raise UserError(f"--rewind: {problems[0]}; choose another step")
        start = self.resume_from(target, notes)
        latest = checkpoint_step(later[-1])
        entry = {
            "rewound_to_step": start.step,
            "from_step": latest,
            "schedule": dump_config(self.config)["schedule"],
        }
        note = (
            f"rewound from step {latest} to step {start.step}; later checkpoints are renamed to"
            " step_*.rewound-*"
        )
        return replace(
            start,
            lineage=[*start.lineage, entry],
            notes=[*start.notes, note],
            superseded=later,
        )

    def was_rewound(self, folder: Path, step: int) -> bool:
        """Return whether a checkpoint's run was rewound to `step` with this run's schedule."""
        schedule = dump_config(self.config)["schedule"]
        return any(
            entry.get("rewound_to_step") == step and entry["schedule"] == schedule
            for entry in read_state(folder).lineage
        )
