"""Starting a run from the weights of another one, or of a Hugging Face folder (`run.init_from`)."""

from __future__ import annotations

from pathlib import Path

from llada.checkpoint.format import (
    TOKENIZER_FOLDER,
    load_tokenizer,
    read_state,
    resolve_checkpoint,
    trained_config,
)
from llada.checkpoint.reading import StoredTensors
from llada.config import RunConfig
from llada.data.training_data import TrainingData
from llada.errors import UserError
from llada.hf.folder import check_mask, is_folder, open_folder
from llada.tokenizer import Tokenizer
from llada.training.starting.settings import changed_constants, refuse_other_architecture
from llada.training.starting.start import Start
from llada.training.starting.verification import verify_on_all_ranks
from llada.types import JsonObject


def start_from_weights(
    config: RunConfig, data: TrainingData, init_from: str, allow_changed: bool, notes: list[str]
) -> Start:
    """Start at step 0 from weights that fit: the same shapes, and ids that mean the same tokens.

    Args:
        config, data: the run's config and data.
        init_from: a checkpoint, a run or a Hugging Face folder.
        allow_changed: accept other constants of the model; they are recorded in the lineage.
        notes: lines for the console so far.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    if is_folder(init_from):
        return _start_from_hf(config, data, Path(init_from), allow_changed, notes)
    source = resolve_checkpoint(init_from, "run.init_from")
    state = read_state(source, "run.init_from")
    model = state.config["model"]
    refuse_other_architecture(f"run.init_from: {source}", config, model)
    changed = changed_constants(source, config, model, allow_changed)
    tokenizer = load_tokenizer(source, "run.init_from")
    _refuse_other_tokenizer(source, tokenizer, data, source / TOKENIZER_FOLDER)
    problems = verify_on_all_ranks(config, source)
    if problems:
        raise UserError(f"run.init_from: {problems[0]}; the checkpoint is damaged; use another one")
    parts = config.run.init_what
    # An import has neither masters nor moments, so there is no optimizer state to take.
    if parts != "weights" and not StoredTensors(source / "model").has_masters:
        raise UserError(
            f"run.init_what: '{parts}', but {source} is an imported checkpoint, which contains only"
            " weights; use weights"
        )
    # Allowed, but rarely meant: the model has seen exactly these samples, in this order.
    notes = list(notes)
    if state.data == data.fingerprint and state.config["seed"] == config.seed:
        notes.append(
            f"seed: {config.seed} and the data are those of {source}: this run reads the same"
            " samples again, from the first; set another seed for another order"
        )
    objective = trained_config(state).objective
    notes += _note_other_objective(config, source, objective)
    notes.append(_describe_model(config))
    entry: JsonObject = {
        "init_from": str(source),
        "objective": objective,
        "step": state.step,
        "tokens": state.tokens,
        "what": parts,
        "sequence_length": state.config["data"]["sequence_length"],
    }
    if changed:
        entry["changed"] = changed
    return Start(
        source,
        optimizer=parts == "weights+optimizer",
        lineage=[*state.lineage, entry],
        notes=notes,
    )


def _start_from_hf(
    config: RunConfig, data: TrainingData, source: Path, allow_changed: bool, notes: list[str]
) -> Start:
    """Start from a Hugging Face folder, whose vocabulary must be complete as it is."""
    if config.run.init_what != "weights":
        raise UserError(
            f"run.init_what: '{config.run.init_what}', but '{source}' is a Hugging Face folder,"
            " which contains only weights; use weights"
        )
    # The tokenizer first: a vocabulary without a mask token is the most frequent difference.
    tokenizer = Tokenizer.load(source, require_mask=False)
    _refuse_other_tokenizer(source, tokenizer, data, source)
    folder = open_folder(source, setting="run.init_from")
    check_mask(folder, tokenizer)
    model = folder.model.model_dump()
    refuse_other_architecture(f"run.init_from: {source}", config, model)
    changed = changed_constants(source, config, model, allow_changed)
    entry: JsonObject = {
        "imported": source.resolve().name,
        "architecture": folder.architecture,
        "objective": folder.objective,
        "sequence_length": folder.max_sequence_length,
    }
    if changed:
        entry["changed"] = changed
    notes = [*notes, *_note_other_objective(config, source, folder.objective)]
    return Start(source, lineage=[entry], notes=[*notes, _describe_model(config)])


def _note_other_objective(config: RunConfig, source: Path, objective: str) -> list[str]:
    """A line for the console if the weights come from another objective, which is allowed."""
    own = config.objective.name
    if objective == own:
        return []
    return [
        f"objective: {source} was trained as {objective}, and this run trains {own}: the weights"
        " are adapted"
    ]


def _describe_model(config: RunConfig) -> str:
    model = config.model.model_dump(exclude={"embedding_init_std"}, exclude_none=True)
    return f"model: {', '.join(f'{key} {value}' for key, value in model.items())}"


def _refuse_other_tokenizer(
    source: Path, tokenizer: Tokenizer, data: TrainingData, tokenizer_path: Path
) -> None:
    """Refuse weights whose tokenizer is not that of the data.

    Args:
        source: folder of the weights.
        tokenizer: the tokenizer that the weights were trained with.
        data: the run's data.
        tokenizer_path: path of the tokenizer, for the message.
    """
    if tokenizer.mask_id < 0:
        raise UserError(
            f"run.init_from: the tokenizer of {source} has no mask token; `llada convert from-hf"
            f" {source} OUT --add-mask-token` makes a checkpoint that has one, with a row of"
            " its own"
        )
    actual = tokenizer.fingerprint
    expected = data.manifest.tokenizer_fingerprint
    if actual != expected:
        raise UserError(
            f"run.init_from: {source} was trained with another tokenizer ({actual[:16]}) than that"
            f" of {data.corpora[0].folder} ({expected[:16]}); prepare the data with"
            f" {tokenizer_path}"
        )
