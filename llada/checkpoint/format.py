"""A checkpoint on disk: its files, its marker, and what it says of its run.

RUN/checkpoints/step_NNNNNNNN/ contains

    model/       the engine's state: a Megatron-Core distributed checkpoint
    tokenizer/   a copy of the tokenizer
    state.json   `CheckpointState`
    COMMITTED    size and checksum of every file above

and is complete when COMMITTED exists. A save writes into a folder with a temporary name, flushes
every file to disk, writes the marker last and renames the folder: a save that was killed leaves a
folder that is never read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from llada.checkpoint.names import (
    MARKER,
    PARTIAL_SUFFIX,
    checkpoint_name,
    committed_checkpoints,
    has_checkpoint_name,
)
from llada.config.sections import ModelSection
from llada.errors import UserError, one_line
from llada.files import checksum, sync_folder, sync_tree, write_json
from llada.tokenizer import Tokenizer
from llada.types import JsonObject

STATE_FILE = "state.json"
TOKENIZER_FOLDER = "tokenizer"

Checksums = Mapping[str, JsonObject]
"""File name -> {"bytes": size, "xxh3": checksum}, see `llada.files.checksum`."""


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says of its run besides the engine's state; state.json contains its fields.

    Attributes:
        step: optimizer steps done.
        samples: training samples consumed.
        tokens: training tokens consumed.
        data: fingerprint of the data.
        config: resolved config of the run.
        versions: versions of the packages that decide the arithmetic, and the number of threads.
        lineage: where the weights came from, oldest first.
        recent: [step, loss, gradient norm] of the last applied steps (0-based), oldest first.
        validation: the last validation line of metrics.jsonl; None before the first validation.
        tokenizer: fingerprint of the tokenizer; empty in checkpoints of versions that did not
            record it.
        ranks: world size of the run; 0 in checkpoints of versions that did not record it.
    """

    step: int
    samples: int
    tokens: int
    data: str
    config: JsonObject
    versions: dict[str, str]
    lineage: list[JsonObject]
    recent: Sequence[Sequence[float]]
    validation: JsonObject | None = None
    tokenizer: str = ""
    ranks: int = 0


@dataclass(frozen=True)
class TrainedConfig:
    """The model in a checkpoint, whether a run wrote it or an import did.

    Attributes:
        model: its shape.
        precision: "fp32" or "bf16": what the run computed in; of an imported checkpoint, what its
            weights are stored in.
        longest: longest sequence that the model was trained on, in this run or one before, in
            tokens.
        objective: name of the objective that it was trained with.
        subs: its softmax was without [MASK], in training.
    """

    model: ModelSection
    precision: str
    longest: int
    objective: str = "masked"
    subs: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether the model writes from left to right, seeing the tokens before only."""
        return self.objective == "autoregressive"


def trained_config(state: CheckpointState) -> TrainedConfig:
    """Return the model that a checkpoint's state describes.

    Raises:
        UserError: the state does not describe a model.
    """
    try:
        model = ModelSection.model_validate(state.config["model"])
        lengths = [state.config["data"]["sequence_length"]]
        lengths += [entry.get("sequence_length", 0) for entry in state.lineage]
        objective = state.config.get("objective", {})
        return TrainedConfig(
            model,
            state.config["precision"],
            max(lengths),
            objective.get("name", "masked"),
            objective.get("subs", False),
        )
    except (AttributeError, KeyError, TypeError, ValidationError) as error:
        reason = one_line(error)
        raise UserError(
            f"checkpoint: its {STATE_FILE} does not describe a model ({reason})"
        ) from None


# -- writing ---------------------------------------------------------------------------------------


def begin_checkpoint(root: Path, step: int) -> Path:
    """Create the temporary folder of a checkpoint, with an empty model/ for the engine.

    What an earlier attempt left under that name is removed. The run folder, the parent of `root`,
    must exist: one that was deleted is not created again.
    """
    partial = root / f"{checkpoint_name(step)}{PARTIAL_SUFFIX}"
    shutil.rmtree(partial, ignore_errors=True)
    root.mkdir(exist_ok=True)
    (partial / "model").mkdir(parents=True)
    sync_folder(root.parent)  # the entry of `root` itself
    return partial


def commit_checkpoint(
    partial: Path, state: CheckpointState, tokenizer: Mapping[str, bytes], written: Checksums
) -> Path:
    """Complete a checkpoint and give it its name.

    Args:
        partial: from `begin_checkpoint`, with the engine's files in model/.
        state: the run's state.
        tokenizer: files of the tokenizer, name -> content.
        written: checksums of the files in model/ that are known already; the others are computed
            by reading the files again.

    Returns:
        The complete checkpoint's folder.
    """
    final = partial.with_name(checkpoint_name(state.step))
    # The name comes after the marker: a folder with the name but no marker has lost it.
    seal_checkpoint(partial, state, tokenizer, written)
    # A folder of this name has no marker, or the run would have resumed from it: it is incomplete.
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync_folder(partial.parent)
    return final


def seal_checkpoint(
    folder: Path, state: CheckpointState, tokenizer: Mapping[str, bytes], written: Checksums
) -> None:
    """Write everything of a checkpoint except model/, the marker last.

    The arguments are those of `commit_checkpoint`.
    """
    (folder / TOKENIZER_FOLDER).mkdir()
    for name, content in tokenizer.items():
        (folder / TOKENIZER_FOLDER / name).write_bytes(content)
    write_json(folder / STATE_FILE, asdict(state), indent=1)
    # Everything is on disk before the marker says so.
    sync_tree(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    sums: dict[str, JsonObject] = {}
    for name in names:
        known = written.get(name.removeprefix("model/"))
        if known is None:
            known = checksum(folder / name)
        sums[name] = known
    write_json(folder / MARKER, {"step": state.step, "files": sums}, indent=1)


# -- reading ---------------------------------------------------------------------------------------


def resolve_checkpoint(path: str | Path, setting: str = "checkpoint") -> Path:
    """Return the checkpoint that `path` means: itself, or the latest one of a run folder.

    Args:
        path: a checkpoint, RUN/checkpoints, or RUN.
        setting: what the user calls `path`, for messages.

    Raises:
        UserError: there is no checkpoint.
    """
    path = Path(path)
    # os.path.isfile, unlike Path.is_file, also answers False for a name that no file can have.
    if os.path.isfile(path / MARKER) or has_checkpoint_name(path):
        return path
    if os.path.isdir(path):
        for root in (path / "checkpoints", path):
            checkpoints = committed_checkpoints(root)
            if checkpoints:
                return checkpoints[-1]
    if not os.path.exists(path):
        raise UserError(f"{setting}: no folder '{path}'")
    raise UserError(
        f"{setting}: '{path}' is neither a checkpoint with a {MARKER} file nor a run with one"
    )


def read_state(folder: Path, setting: str = "checkpoint") -> CheckpointState:
    """Read the state of a checkpoint.

    Args:
        folder: the checkpoint.
        setting: what the user calls `folder`, for messages.

    Raises:
        UserError: `folder` is not a complete checkpoint, or its state is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{setting}: no folder '{folder}'")
    if not (folder / MARKER).is_file():
        raise UserError(
            f"{setting}: {folder} has no {MARKER} file; its save was cut off, or it is not a"
            " checkpoint"
        )
    try:
        return CheckpointState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{setting}: {folder / STATE_FILE} is damaged ({error})") from None


def load_tokenizer(folder: Path, setting: str = "checkpoint") -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        folder: the checkpoint.
        setting: what the user calls `folder`, for messages.

    Raises:
        UserError: it cannot be read, or the model was trained with another one.
    """
    tokenizer = Tokenizer.load(folder / TOKENIZER_FOLDER)
    recorded = read_state(folder, setting).tokenizer
    if recorded and tokenizer.fingerprint != recorded:
        raise UserError(
            f"{setting}: {folder / TOKENIZER_FOLDER} is not the tokenizer that the model was"
            f" trained with: its fingerprint differs from the one in {STATE_FILE}; put the right"
            " one back, or use another checkpoint"
        )
    return tokenizer
